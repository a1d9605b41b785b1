//! The law: a request's tokens depend on the request alone. Whatever else is in the batch,
//! however prompts are cut, whatever is cached, taken away or resumed.

use proptest::prelude::*;
use shoal_core::{Namespace, Speculation, draft_anchor};

use super::fake::{FakeBackend, spec};
use super::rig::{Collected, Rig, alone, key, request};
use crate::config::EngineConfig;
use crate::request::{Finish, Request};
use crate::speculation::PushedDraft;

const VOCAB: usize = 61;
/// Fits the smallest pool below, so that every pool gives the same lengths.
const CONTEXT: usize = 256;

fn config(prefill_chunk: usize) -> EngineConfig {
    EngineConfig {
        prefill_chunk,
        ..EngineConfig::default()
    }
}

fn rig(pages: u32, config: &EngineConfig) -> Rig {
    Rig::new(FakeBackend::new(pages, spec(VOCAB, CONTEXT)), config)
}

/// A prompt of a shared beginning and an own end.
fn prompt(shared: usize, own: usize, id: u64) -> Vec<u32> {
    let shared = (0..shared as u32).map(|i| i % VOCAB as u32);
    let own = (0..own as u32).map(|i| (i * 7 + id as u32) % VOCAB as u32);
    shared.chain(own).collect()
}

fn lone(request: &Request) -> Collected {
    alone(request.clone(), VOCAB, CONTEXT)
}

fn assert_same(got: &Collected, expected: &Collected) {
    assert_eq!(got.tokens, expected.tokens);
    assert_eq!(got.logprobs, expected.logprobs);
    assert_eq!(got.prompt_logprobs, expected.prompt_logprobs);
    assert_eq!(got.finish(), expected.finish());
}

#[test]
fn a_batch_of_32_gives_the_tokens_of_each_alone() {
    let requests: Vec<Request> = (0..32)
        .map(|id| request(id, prompt(70, id as usize * 3, id), 40))
        .collect();
    let mut rig = rig(256, &config(64));
    for request in &requests {
        rig.submit(request.clone()).unwrap();
    }
    rig.run();
    for (id, request) in (0..).zip(&requests) {
        assert_same(rig.of(id), &lone(request));
    }
    let preempted = rig.metrics.preemptions.get();
    assert_eq!(preempted, 0);
}

#[test]
fn every_chunk_size_gives_the_same_tokens() {
    let wanted = request(1, prompt(100, 33, 1), 12);
    let expected = lone(&wanted);
    for chunk in 1..=64 {
        let mut rig = rig(16, &config(chunk));
        rig.submit(wanted.clone()).unwrap();
        rig.run();
        assert_same(rig.of(1), &expected);
    }
}

#[test]
fn a_prefix_hit_changes_no_token() {
    let first = request(1, prompt(96, 0, 1), 10);
    let second = request(2, prompt(96, 20, 2), 10);
    let mut rig = rig(16, &config(256));
    for wanted in [&first, &second] {
        rig.submit(wanted.clone()).unwrap();
        rig.run();
    }
    assert_same(rig.of(2), &lone(&second));
    let (_, usage) = rig.of(2).finish.unwrap();
    assert_eq!(usage.cached_tokens, 96);
    // The last prompt token is computed again even if all of its page is cached.
    let mut third = first.clone();
    third.key = key(3);
    rig.submit(third).unwrap();
    rig.run();
    assert_eq!(rig.of(3).tokens, rig.of(1).tokens);
    assert_eq!(rig.of(3).finish.unwrap().1.cached_tokens, 64);
}

#[test]
fn an_answer_that_comes_back_as_prompt_is_computed_again() {
    let first = request(1, prompt(40, 0, 1), 60);
    let mut rig = rig(16, &config(256));
    rig.submit(first.clone()).unwrap();
    rig.run();
    let mut history = first.prompt.clone();
    history.extend_from_slice(&rig.of(1).tokens);
    let second = request(2, history, 10);
    rig.submit(second.clone()).unwrap();
    rig.run();
    assert_eq!(rig.of(2).finish.unwrap().1.cached_tokens, 32);
    assert_same(rig.of(2), &lone(&second));
}

#[test]
fn a_resumed_answer_goes_on_as_if_never_broken() {
    let mut whole = request(1, prompt(30, 10, 1), 50);
    whole.sampling.frequency_penalty = 0.7;
    whole.sampling.repetition_penalty = 1.2;
    whole.stopping.min_tokens = 30;
    whole.stopping.stop_tokens = (0..20).collect();
    let expected = lone(&whole);
    for done in 0..=expected.tokens.len() {
        let mut rest = whole.clone();
        rest.resume = expected.tokens[..done].to_vec();
        let got = lone(&rest);
        assert_eq!(got.tokens, expected.tokens[done..]);
        assert_eq!(got.finish(), expected.finish());
    }
}

#[test]
fn choices_share_the_prompt_and_differ() {
    let mut rig = rig(64, &config(256));
    for choice in 0..4 {
        let mut one = request(u64::from(choice), prompt(150, 0, 0), 20);
        (one.sampling.seed, one.sampling.choice) = (9, choice);
        rig.submit(one).unwrap();
    }
    rig.run();
    for choice in 1..4 {
        assert_ne!(rig.of(choice).tokens, rig.of(0).tokens);
        assert_eq!(rig.of(choice).finish.unwrap().1.cached_tokens, 128);
    }
}

#[test]
fn walls_between_tenants() {
    let mut rig = rig(64, &config(256));
    for (id, (tenant, salt)) in [("a", ""), ("b", ""), ("a", "salt"), ("a", "")]
        .into_iter()
        .enumerate()
    {
        let mut one = request(id as u64, prompt(100, 0, 0), 5);
        one.namespace = Namespace::new(tenant, salt);
        one.sampling.seed = 1;
        rig.submit(one).unwrap();
        rig.run();
    }
    let cached = |id| rig.of(id).finish.unwrap().1.cached_tokens;
    assert_eq!([cached(0), cached(1), cached(2), cached(3)], [0, 0, 0, 96]);
    assert_eq!(rig.of(1).tokens, rig.of(0).tokens);
}

#[test]
fn preempted_sequences_keep_their_tokens() {
    // Eight sequences of up to 6 pages in 12 pages.
    let requests: Vec<Request> = (0..8)
        .map(|id| request(id, prompt(0, 40, id), 140))
        .collect();
    let mut rig = rig(12, &config(64));
    for request in &requests {
        rig.submit(request.clone()).unwrap();
    }
    rig.run();
    for (id, request) in (0..).zip(&requests) {
        assert_same(rig.of(id), &lone(request));
    }
    assert!(rig.metrics.preemptions.get() > 0);
}

#[derive(Clone, Debug)]
struct Case {
    request: Request,
    arrives: usize,
    cancelled_after: Option<usize>,
}

type Parts = (
    (usize, usize, u32),
    (f32, u32, f32, f32),
    (u32, bool, bool),
    (usize, Option<usize>),
    u64,
);

fn cases() -> impl Strategy<Value = Vec<Case>> {
    let one = (
        (0usize..4, 1usize..50, 0u32..60),
        (
            prop_oneof![Just(0.0f32), Just(0.8f32), Just(1.3)],
            prop_oneof![Just(0u32), Just(5)],
            prop_oneof![Just(1.0f32), Just(0.6)],
            prop_oneof![Just(1.0f32), Just(1.4)],
        ),
        (0u32..3, any::<bool>(), any::<bool>()),
        (0usize..30, proptest::option::weighted(0.2, 0usize..30)),
        any::<u64>(),
    );
    let build = |id: u64, (length, law, flags, times, seed): Parts| {
        let (pages, own, max_tokens) = length;
        let (temperature, top_k, top_p, repetition) = law;
        let (priority, stops, logprobs) = flags;
        let mut request = request(id, prompt(pages * 32, own, seed % 3), max_tokens);
        request.sampling.temperature = temperature;
        request.sampling.top_k = top_k;
        request.sampling.top_p = top_p;
        request.sampling.repetition_penalty = repetition;
        request.sampling.seed = seed;
        request.priority = priority;
        if stops {
            request.stopping.stop_tokens = vec![3, 4];
            request.stopping.min_tokens = max_tokens / 4;
        }
        if logprobs {
            request.scoring.output_top = Some(2);
            request.scoring.prompt_top = (seed % 2 == 0).then_some(1);
        }
        Case {
            request,
            arrives: times.0,
            cancelled_after: times.1,
        }
    };
    proptest::collection::vec(one, 1..14).prop_map(move |all| {
        let numbered = (0..).zip(all);
        numbered.map(|(id, parts)| build(id, parts)).collect()
    })
}

/// The tokens that will come after `done` ones, and after `wrong` of these what will not.
fn drafted(request: &Request, alone: &Collected, done: usize, wrong: usize) -> PushedDraft {
    let mut text = request.prompt.clone();
    text.extend_from_slice(&alone.tokens[..done]);
    let tokens = alone.tokens[done..].iter().enumerate();
    PushedDraft {
        base: done as u32,
        anchor: draft_anchor(&text),
        tokens: tokens
            .map(|(i, &token)| if i < wrong { token } else { 0 })
            .collect(),
        parents: Vec::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Arrivals, cancellations, small pools, small budgets: the tokens are those of the
    /// request alone, and every page is accounted for after every step (the rig checks).
    #[test]
    fn tokens_depend_on_the_request_alone(
        cases in cases(),
        pages in 8u32..30,
        prefill_chunk in 1usize..64,
        step_rows in 4usize..80,
        max_running in 1usize..16,
        logit_rows in 2usize..20,
        prefix_cache in any::<bool>(),
        speculation in prop_oneof![
            Just(Speculation::Off), Just(Speculation::Auto), (1u32..33).prop_map(Speculation::Fixed),
        ],
        wrong in 0usize..12,
    ) {
        let config = EngineConfig {
            prefill_chunk,
            step_rows,
            max_running,
            prefix_cache,
            speculation,
            ..EngineConfig::default()
        };
        let alone: Vec<_> = cases.iter().map(|case| lone(&case.request)).collect();
        let backend = FakeBackend::new(pages, spec(VOCAB, CONTEXT)).with_rows(64, logit_rows);
        let mut rig = Rig::new(backend, &config);
        for step in 0..60 {
            for (id, case) in (0..).zip(&cases) {
                if case.arrives == step {
                    rig.submit(case.request.clone()).unwrap();
                }
                if case.cancelled_after.is_some_and(|after| case.arrives + after == step) {
                    rig.cancel(id);
                }
                let done = rig.collected.get(&key(id)).map_or(0, |c| c.tokens.len());
                rig.stepper.draft(key(id), drafted(&case.request, &alone[id as usize], done, wrong));
            }
            rig.step();
        }
        rig.run();
        for (id, expected) in (0..).zip(&alone) {
            let got = rig.of(id);
            if got.finish() == Some(Finish::Cancelled) {
                prop_assert!(expected.tokens.starts_with(&got.tokens));
            } else {
                assert_same(got, expected);
            }
        }
        let (_, load) = rig.stepper.output();
        prop_assert_eq!((load.running, load.waiting, load.waiting_uncached_tokens), (0, 0, 0));
        prop_assert_eq!(load.kv_usage, 0.0);
    }
}
