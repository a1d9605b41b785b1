use proptest::prelude::*;
use shoal_proto::{
    inference::{GenerateRequest, ResponseOptions, Stopping},
    worker::SequenceUsage,
};

use super::*;
use crate::{
    generation::End,
    testing::{self, END, WORD},
};

async fn output(stops: &[&str], min_tokens: u32) -> Output {
    let stopping = Stopping {
        stop: stops.iter().map(|stop| (*stop).to_owned()).collect(),
        min_tokens: Some(min_tokens),
        ..Stopping::default()
    };
    let request = GenerateRequest {
        stopping: Some(stopping),
        ..GenerateRequest::default()
    };
    Output::new(&testing::job(request).await).unwrap()
}

fn bytes(text: &str) -> Vec<TokenId> {
    text.bytes().map(u32::from).collect()
}

/// Tokens with a log-probability each, its number in the stream.
fn news(tokens: &[TokenId], first: usize) -> Tokens {
    let logprobs = (first..).take(tokens.len()).map(|i| Logprob {
        logprob: -(i as f32),
        ..Logprob::default()
    });
    Tokens {
        logprobs: logprobs.collect(),
        tokens: tokens.to_vec(),
        ..Tokens::default()
    }
}

fn text(text: &str) -> Tokens {
    news(&bytes(text), 0)
}

fn ended(tokens: Tokens, stopped: bool) -> Tokens {
    let usage = SequenceUsage::default();
    let end = Some(End { stopped, usage });
    Tokens { end, ..tokens }
}

#[tokio::test]
async fn a_character_waits_for_its_last_byte() {
    let mut output = output(&[], 0).await;
    let first = output.push(0, news(&[0xc3], 0));
    assert_eq!(first.text, "");
    let second = output.push(0, news(&[0xa9], 1));
    assert_eq!((second.text.as_str(), second.finish), ("é", None));
    assert_eq!(output.completion_tokens(), 2);
}

#[tokio::test]
async fn an_unfinished_character_is_replaced_at_the_end() {
    let mut output = output(&[], 0).await;
    let growth = output.push(3, ended(news(&[65, 0xc3], 0), false));
    assert_eq!((growth.index, growth.text.as_str()), (3, "A\u{fffd}"));
    assert_eq!(growth.token_ids, [65, 0xc3]);
    assert_eq!(growth.finish, Some(FinishReason::Length));
}

#[tokio::test]
async fn the_stop_token_is_counted_and_not_shown() {
    let mut output = output(&["never"], 0).await;
    let growth = output.push(0, ended(news(&[65, END], 0), true));
    assert_eq!((growth.text.as_str(), growth.stop), ("A", None));
    assert_eq!((growth.token_ids, growth.logprobs.len()), (vec![65], 1));
    assert_eq!(growth.finish, Some(FinishReason::Stop));
    assert_eq!(output.completion_tokens(), 2);
}

#[tokio::test]
async fn what_may_become_a_stop_string_is_held_back_with_its_tokens() {
    let mut output = output(&["STOP"], 0).await;
    let held = output.push(0, text("a ST"));
    assert_eq!((held.text.as_str(), held.token_ids), ("a ", bytes("a ")));
    assert_eq!(held.logprobs.len(), 2);
    let freed = output.push(0, text("b"));
    assert_eq!(
        (freed.text.as_str(), freed.token_ids),
        ("STb", bytes("STb"))
    );
    assert_eq!(freed.logprobs.len(), 3);
    let found = output.push(0, text("xSTOPy"));
    assert_eq!((found.text.as_str(), found.token_ids), ("x", bytes("x")));
    assert_eq!(found.stop.as_deref(), Some("STOP"));
    assert_eq!(found.finish, Some(FinishReason::Stop));
    // All up to the end of the stop string.
    assert_eq!(output.completion_tokens(), 10);
}

#[tokio::test]
async fn the_end_lets_go_what_was_held() {
    let mut output = output(&["STOP"], 0).await;
    let growth = output.push(0, ended(text("ST"), false));
    assert_eq!(
        (growth.text.as_str(), growth.token_ids),
        ("ST", bytes("ST"))
    );
    assert_eq!(growth.finish, Some(FinishReason::Length));
}

#[tokio::test]
async fn a_token_over_the_cut_gives_its_beginning() {
    let mut output = output(&["yz!"], 0).await;
    let held = output.push(0, news(&[WORD], 0));
    assert_eq!((held.text.as_str(), held.token_ids.len()), ("wx", 0));
    let found = output.push(0, text("!"));
    assert_eq!((found.text.as_str(), found.token_ids), ("", vec![WORD]));
    assert_eq!(found.logprobs.len(), 1);
    assert_eq!(found.stop.as_deref(), Some("yz!"));
}

#[tokio::test]
async fn stop_strings_count_after_min_tokens() {
    let mut output = output(&["b"], 3).await;
    let growth = output.push(0, text("abbcbd"));
    assert_eq!(
        (growth.text.as_str(), growth.stop.as_deref()),
        ("abbc", Some("b"))
    );
    assert_eq!(output.completion_tokens(), 5);
}

#[tokio::test]
async fn an_echo_comes_first_and_once() {
    let request = GenerateRequest {
        response: Some(ResponseOptions {
            logprobs: true,
            top_logprobs: 0,
            echo: true,
        }),
        ..GenerateRequest::default()
    };
    let mut output = Output::new(&testing::job(request).await).unwrap();
    let unscored = Logprob {
        unscored: true,
        ..Logprob::default()
    };
    let first = output.push(
        0,
        Tokens {
            prompt_logprobs: vec![unscored, Logprob::default()],
            ..text("c")
        },
    );
    assert_eq!(
        (first.text.as_str(), &first.token_ids),
        ("abc", &bytes("abc"))
    );
    let unscored: Vec<bool> = first.logprobs.iter().map(|l| l.unscored).collect();
    assert_eq!(unscored, [true, false, false]);
    assert_eq!(output.completion_tokens(), 1);
    assert_eq!(output.push(0, text("d")).text, "d");
}

/// All that an output gave, put together.
#[derive(Debug, Default, PartialEq)]
struct Sum {
    text: String,
    tokens: Vec<TokenId>,
    logprobs: Vec<f32>,
    finish: Option<FinishReason>,
    stop: Option<String>,
    completion_tokens: u32,
}

async fn sum(stops: &[&str], tokens: &[TokenId], cuts: &[usize]) -> Sum {
    let mut output = output(stops, 0).await;
    let mut sum = Sum::default();
    let mut at: usize = 0;
    for cut in cuts.iter().copied().chain([usize::MAX]) {
        let to = at.saturating_add(cut).min(tokens.len());
        let part = news(&tokens[at..to], at);
        at = to;
        let last = at == tokens.len();
        let growth = output.push(0, if last { ended(part, false) } else { part });
        sum.text += &growth.text;
        sum.tokens.extend(growth.token_ids);
        sum.logprobs
            .extend(growth.logprobs.iter().map(|l| l.logprob));
        (sum.finish, sum.stop) = (growth.finish, growth.stop);
        if sum.finish.is_some() {
            break;
        }
    }
    sum.completion_tokens = output.completion_tokens();
    sum
}

proptest! {
    /// However a worker cuts its tokens into steps, the answer is the same.
    #[test]
    fn steps_do_not_show(
        tokens in prop::collection::vec(
            prop::sample::select(vec![97, 98, 99, 0xc3, 0xa9, WORD]), 1..40),
        cuts in prop::collection::vec(0..5usize, 0..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let stops = ["abc", "za", "é"];
        let whole = runtime.block_on(sum(&stops, &tokens, &[]));
        let cut = runtime.block_on(sum(&stops, &tokens, &cuts));
        prop_assert_eq!(&cut, &whole);
        // The tokens shown are the first ones, each with its own log-probability.
        prop_assert_eq!(&cut.tokens, &tokens[..cut.tokens.len()]);
        let own: Vec<f32> = (0..cut.tokens.len()).map(|i| -(i as f32)).collect();
        prop_assert_eq!(&cut.logprobs, &own);
    }
}
