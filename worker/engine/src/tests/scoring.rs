//! Scores of prompt tokens.

use super::fake::{FakeBackend, spec};
use super::rig::{Rig, alone, key, request};
use crate::config::EngineConfig;
use crate::request::{Finish, Logprob, Request};

fn scored(id: u64, prompt: Vec<u32>, max_tokens: u32) -> Request {
    let mut request = request(id, prompt, max_tokens);
    request.scoring.prompt_top = Some(2);
    request
}

#[test]
fn every_prompt_token_is_scored_once_by_its_predecessors() {
    let prompt: Vec<u32> = (0..90).map(|i| i * 11 % 40).collect();
    let whole = alone(scored(1, prompt.clone(), 0), 40, 256);
    assert_eq!(whole.finish(), Some(Finish::Length));
    assert!(whole.tokens.is_empty());
    assert_eq!(whole.prompt_logprobs.len(), 90);
    let first = Logprob {
        logprob: None,
        top: vec![],
    };
    assert_eq!(whole.prompt_logprobs[0], first);
    // The score of token n is the log-probability of drawing it after the n before.
    for n in [1, 31, 32, 33, 89] {
        let mut forced = request(2, prompt[..n].to_vec(), 1);
        forced.scoring.output_top = Some(2);
        forced.sampling.logit_bias = vec![(prompt[n], 100.0)];
        let drawn = alone(forced, 40, 256);
        assert_eq!(drawn.tokens, [prompt[n]]);
        assert_eq!(drawn.logprobs[0], whole.prompt_logprobs[n]);
    }
}

#[test]
fn few_logit_rows_and_small_chunks_score_the_same() {
    let prompt: Vec<u32> = (0..90).map(|i| i * 7 % 40).collect();
    let expected = alone(scored(1, prompt.clone(), 3), 40, 256);
    for logit_rows in [1, 2, 7] {
        let backend = FakeBackend::new(16, spec(40, 256)).with_rows(64, logit_rows);
        let mut rig = Rig::new(backend, &EngineConfig::default());
        // What is cached must not be skipped: its logits are wanted.
        rig.submit(request(9, prompt.clone(), 1)).unwrap();
        rig.run();
        rig.submit(scored(1, prompt.clone(), 3)).unwrap();
        rig.run();
        assert_eq!(rig.of(1).tokens, expected.tokens);
        assert_eq!(rig.of(1).prompt_logprobs, expected.prompt_logprobs);
    }
}

#[test]
fn scores_survive_a_preemption() {
    let prompt: Vec<u32> = (0..200).map(|i| i * 7 % 40).collect();
    let expected = alone(scored(1, prompt.clone(), 3), 40, 256);
    let config = EngineConfig {
        prefill_chunk: 50,
        max_running: 1,
        ..EngineConfig::default()
    };
    let mut rig = Rig::new(FakeBackend::new(16, spec(40, 256)), &config);
    rig.submit(scored(1, prompt, 3)).unwrap();
    rig.step();
    rig.step();
    let mut urgent = request(2, vec![1], 1);
    urgent.priority = 1;
    rig.submit(urgent).unwrap();
    rig.run();
    assert_eq!(rig.of(1).finish.unwrap().1.preemptions, 1);
    assert_eq!(rig.of(1).prompt_logprobs, expected.prompt_logprobs);
    assert_eq!(rig.of(1).tokens, expected.tokens);
}

#[test]
fn a_prompt_of_one_token_has_nothing_to_score() {
    let one = alone(scored(1, vec![3], 2), 40, 256);
    assert_eq!(one.prompt_logprobs.len(), 1);
    assert_eq!(one.tokens.len(), 2);
    let none = alone(scored(1, vec![3], 0), 40, 256);
    assert_eq!(none.prompt_logprobs.len(), 1);
    assert_eq!(none.finish(), Some(Finish::Length));
}

#[test]
fn scores_come_before_the_first_token() {
    let mut rig = Rig::new(
        FakeBackend::new(16, spec(40, 256)),
        &EngineConfig::default(),
    );
    rig.submit(scored(1, vec![1; 40], 3)).unwrap();
    rig.step();
    assert_eq!(rig.collected[&key(1)].prompt_logprobs.len(), 40);
}
