//! Drafts change the speed and nothing else: whatever they hold, whenever they come.

use std::sync::{Arc, RwLock};
use std::time::Instant;

use shoal_core::{Sampling, Speculation, draft_anchor};
use shoal_draft::Corpus;

use super::fake::{FakeBackend, Fault, spec};
use super::rig::{Collected, Rig, alone, request};
use crate::config::EngineConfig;
use crate::request::{Finish, Request};
use crate::speculation::{Drafter, PushedDraft};

const VOCAB: usize = 61;
const CONTEXT: usize = 256;
/// Sequences of a setting, and output tokens of each: 10,000 tokens and more.
const SEQUENCES: u64 = 84;
const OUTPUT: u32 = 120;
/// Sequences that run together.
const TOGETHER: u64 = 12;

fn config() -> EngineConfig {
    EngineConfig {
        prefill_chunk: 40,
        ..EngineConfig::default()
    }
}

fn assert_same(got: &Collected, expected: &Collected) {
    assert_eq!(got.tokens, expected.tokens);
    assert_eq!(got.logprobs, expected.logprobs);
    assert_eq!(got.finish(), expected.finish());
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The best draft there is, from an output position on.
fn oracle(request: &Request, expected: &[u32], base: usize, most: usize) -> PushedDraft {
    let base = base.min(expected.len());
    let mut before = request.prompt.clone();
    before.extend_from_slice(&expected[..base]);
    PushedDraft {
        base: base as u32,
        anchor: draft_anchor(&before),
        tokens: expected[base..].iter().copied().take(most).collect(),
        parents: Vec::new(),
    }
}

/// What a drafter may do at worst: right, late, early, corrupt, of another place, unknown
/// tokens, senseless tries. Of those, `which` chooses.
fn draft(request: &Request, expected: &[u32], done: usize, state: &mut u64) -> PushedDraft {
    let most = (random(state) % 40) as usize;
    let mut draft = oracle(request, expected, done, most);
    match random(state) % 10 {
        0 => draft = oracle(request, expected, done.saturating_sub(3), most),
        1 => draft = oracle(request, expected, done + 2, most),
        2 => draft.anchor ^= 1,
        3 => draft.tokens = (0..most as u64).map(|_| random(state) as u32).collect(),
        4 | 5 => {
            // Right up to a place, then wrong.
            let length = draft.tokens.len().max(1) as u64;
            let wrong = (random(state) % length) as usize;
            for token in draft.tokens.iter_mut().skip(wrong) {
                *token = (*token + 1) % VOCAB as u32;
            }
        }
        6 => {
            draft.parents = (0..most as u64)
                .map(|_| (random(state) % 70) as u32)
                .collect()
        }
        // A trie whose first branch is wrong and whose second is right.
        7 if !draft.tokens.is_empty() => {
            let first = draft.tokens[0];
            draft.tokens.insert(0, (first + 1) % VOCAB as u32);
            draft.parents = [0, 0]
                .into_iter()
                .chain(2..draft.tokens.len() as u32)
                .collect();
        }
        _ => {}
    }
    draft
}

/// Runs requests of one setting with every sort of draft, in too small a pool, and compares
/// each with itself alone and undrafted. Gives the tokens made.
fn check(setting: impl Fn(&mut Request), mode: Speculation) -> usize {
    let mut state = 7;
    let mut tokens = 0;
    let (mut accepted, mut drafted, mut preemptions) = (0, 0, 0);
    for first in (0..SEQUENCES).step_by(TOGETHER as usize) {
        let backend = FakeBackend::new(34, spec(VOCAB, CONTEXT)).with_rows(64, 40);
        let mut rig = Rig::new(backend, &config());
        rig.set_pace(1);
        let requests: Vec<Request> = (first..first + TOGETHER)
            .map(|id| {
                let prompt = (0..10 + id as u32 % 30)
                    .map(|i| i * 7 % VOCAB as u32)
                    .collect();
                let mut request = request(id, prompt, OUTPUT);
                request.speculation = mode;
                setting(&mut request);
                request
            })
            .collect();
        let expected: Vec<Collected> = requests
            .iter()
            .map(|request| alone(request.clone(), VOCAB, CONTEXT))
            .collect();
        for request in &requests {
            rig.submit(request.clone()).unwrap();
        }
        while !rig.stepper.is_empty() {
            for (request, expected) in requests.iter().zip(&expected) {
                let done = rig
                    .collected
                    .get(&request.key)
                    .map_or(0, |c| c.tokens.len());
                let draft = draft(request, &expected.tokens, done, &mut state);
                // Twice: the newest wins.
                rig.stepper.draft(request.key, PushedDraft::default());
                rig.stepper.draft(request.key, draft);
            }
            rig.step();
        }
        rig.run();
        for (request, expected) in requests.iter().zip(&expected) {
            let got = rig.of(request.key.sequence);
            assert_same(got, expected);
            let usage = got.finish.unwrap().1;
            tokens += got.tokens.len();
            drafted += usage.drafted;
            accepted += usage.accepted;
            preemptions += usage.preemptions;
        }
    }
    // Longer answers than stops allow fill the pool.
    assert!(preemptions > 0 || tokens < 10_000);
    if mode == Speculation::Off {
        assert_eq!(drafted, 0);
    } else {
        // Drafts were verified, right ones and wrong ones.
        assert!(
            accepted > 0 && drafted > accepted,
            "{accepted} of {drafted}"
        );
    }
    tokens
}

#[test]
fn no_draft_changes_a_token() {
    let greedy = |r: &mut Request| r.sampling.temperature = 0.0;
    let plain = |_: &mut Request| {};
    let truncated = |r: &mut Request| {
        r.sampling = Sampling {
            temperature: 0.8,
            top_k: 20,
            top_p: 0.9,
            min_p: 0.01,
            ..r.sampling.clone()
        };
        r.scoring.output_top = Some(3);
    };
    let penalized = |r: &mut Request| {
        r.sampling.presence_penalty = 0.5;
        r.sampling.frequency_penalty = 0.3;
        r.sampling.repetition_penalty = 1.3;
        r.scoring.output_top = Some(1);
    };
    let biased = |r: &mut Request| {
        r.sampling.temperature = 0.0;
        r.sampling.repetition_penalty = 1.2;
        r.sampling.logit_bias = vec![(3, 2.0), (9, -100.0)];
        r.stopping.min_tokens = OUTPUT - 1;
        r.stopping.stop_tokens = (0..40).collect();
    };
    let settings: [&dyn Fn(&mut Request); 5] = [&greedy, &plain, &truncated, &penalized, &biased];
    for setting in settings {
        for mode in [Speculation::Auto, Speculation::Fixed(7)] {
            assert!(check(setting, mode) >= 10_000);
        }
    }
    assert!(check(plain, Speculation::Off) >= 10_000);
}

#[test]
fn stops_end_the_answer_inside_a_draft() {
    let setting = |r: &mut Request| {
        r.stopping.min_tokens = 5;
        r.stopping.stop_tokens = vec![1, 2];
        r.scoring.output_top = Some(0);
    };
    check(setting, Speculation::Fixed(32));
}

#[test]
fn choices_and_resumed_answers_are_drafted_for_like_any() {
    let mut state = 3;
    for choice in 0..3 {
        let mut whole = request(9, vec![5; 20], 60);
        whole.sampling.choice = choice;
        whole.sampling.frequency_penalty = 0.7;
        let expected = alone(whole.clone(), VOCAB, CONTEXT);
        for done in 0..expected.tokens.len() {
            let backend = FakeBackend::new(16, spec(VOCAB, CONTEXT));
            let mut rig = Rig::new(backend, &config());
            let mut rest = whole.clone();
            rest.resume = expected.tokens[..done].to_vec();
            rest.speculation = Speculation::Fixed(16);
            rig.submit(rest.clone()).unwrap();
            while !rig.stepper.is_empty() {
                let made = rig.collected.get(&rest.key).map_or(0, |c| c.tokens.len());
                let draft = draft(&whole, &expected.tokens, done + made, &mut state);
                rig.stepper.draft(rest.key, draft);
                rig.step();
            }
            rig.run();
            assert_eq!(rig.of(9).tokens, expected.tokens[done..]);
        }
    }
}

/// An answer that repeats itself takes fewer steps than tokens, and one whose text a corpus
/// holds does from its first tokens on.
#[test]
fn lookups_save_steps() {
    let steps = |mode, bias: Vec<(u32, f32)>, corpora| {
        let backend = FakeBackend::new(16, spec(VOCAB, CONTEXT));
        let probe = backend.probe();
        let mut rig = Rig::new(backend, &config());
        rig.set_pace(1);
        let mut wanted = request(1, vec![1, 2, 3], 100);
        wanted.sampling.logit_bias = bias;
        wanted.speculation = mode;
        wanted.corpora = corpora;
        rig.submit(wanted).unwrap();
        rig.run();
        let tokens = rig.of(1).tokens.clone();
        (
            probe.steps.load(std::sync::atomic::Ordering::Relaxed),
            tokens,
        )
    };
    let same = vec![(4, 100.0)];
    let (plain, tokens) = steps(Speculation::Off, same.clone(), vec![]);
    assert_eq!((plain, tokens.len()), (100, 100));
    for (mode, most) in [(Speculation::Auto, 30), (Speculation::Fixed(7), 20)] {
        let (drafted, _) = steps(mode, same.clone(), vec![]);
        assert!(drafted <= most, "{mode}: {drafted} steps");
    }
    let (_, tokens) = steps(Speculation::Off, vec![], vec![]);
    let mut corpus = Corpus::new(1024);
    corpus.push(&tokens, Instant::now());
    let corpora = vec![(Drafter::Tenant, Arc::new(RwLock::new(corpus)))];
    let (drafted, same) = steps(Speculation::Fixed(15), vec![], corpora);
    assert_eq!(same, tokens);
    assert!(drafted <= 14, "{drafted} steps");
}

#[test]
fn a_failed_step_loses_nothing_of_a_draft() {
    let backend = FakeBackend::new(16, spec(VOCAB, CONTEXT));
    let probe = backend.probe();
    let mut rig = Rig::new(backend, &config());
    let mut wanted = request(1, vec![1, 2, 3], 50);
    wanted.speculation = Speculation::Fixed(8);
    let expected = alone(wanted.clone(), VOCAB, CONTEXT).tokens;
    rig.submit(wanted.clone()).unwrap();
    rig.step();
    rig.step();
    rig.stepper
        .draft(wanted.key, oracle(&wanted, &expected, 2, 8));
    probe.faults.lock().unwrap().push_back(Fault::Nan);
    rig.step();
    // What was drawn before the broken row stays.
    let got = rig.of(1);
    assert_eq!(got.finish(), Some(Finish::Preempted));
    assert!(expected.starts_with(&got.tokens));
}

/// Draft rows are the last that a step gives room to.
#[test]
fn drafts_take_no_page_and_no_row_from_anybody() {
    let backend = FakeBackend::new(8, spec(VOCAB, CONTEXT)).with_rows(16, 4);
    let probe = backend.probe();
    let mut rig = Rig::new(backend, &config());
    for id in 0..4 {
        let mut wanted = request(id, vec![1; 8], 50);
        wanted.sampling.logit_bias = vec![(4, 100.0)];
        wanted.speculation = Speculation::Fixed(32);
        rig.submit(wanted).unwrap();
    }
    rig.run();
    assert_eq!(rig.metrics.preemptions.get(), 0);
    assert!(probe.most_rows.load(std::sync::atomic::Ordering::Relaxed) <= 16);
    for id in 0..4 {
        assert_eq!(rig.of(id).tokens.len(), 50);
    }
}
