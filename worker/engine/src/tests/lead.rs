//! Sequences that run ahead of others.

use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;

use super::fake::{FakeBackend, spec};
use super::rig::{Rig, alone, key, request};
use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::request::{Finish, Request, SequenceOutput, StepSink};

const VOCAB: usize = 50;
const CONTEXT: usize = 512;
const AHEAD: usize = 4;

fn leading(id: u64, max_tokens: u32) -> Request {
    Request {
        lead: Some(AHEAD as u32),
        ..request(id, vec![1, 2, 3], max_tokens)
    }
}

/// The tokens that follow an output.
fn after(output: &[u32], tokens: usize) -> Vec<u32> {
    let mut resumed = request(1, vec![1, 2, 3], (output.len() + tokens) as u32);
    resumed.resume = output.to_vec();
    alone(resumed, VOCAB, CONTEXT).tokens
}

fn rig() -> Rig {
    Rig::new(
        FakeBackend::new(64, spec(VOCAB, CONTEXT)),
        &EngineConfig::default(),
    )
}

/// The rig itself takes no output that goes back.
fn step(rig: &mut Rig) {
    rig.stepper.step().expect("no fault");
    let (output, _) = rig.stepper.output();
    output.sequences.clear();
    rig.stepper.check();
}

/// Steps until it is far enough ahead; gives what it has from `offset` on.
fn rest(rig: &mut Rig, offset: usize) -> Vec<u32> {
    for _ in 0..100 {
        if rig.stepper.rests() {
            return rig.stepper.output_of(key(1))[offset..].to_vec();
        }
        step(rig);
    }
    panic!("it never rests");
}

#[test]
fn it_rests_ahead_and_goes_on_when_it_is_told_more() {
    let mut rig = rig();
    rig.submit(leading(1, 100)).unwrap();
    let first = rest(&mut rig, 0);
    assert_eq!(first, after(&[], AHEAD));
    // As it said.
    rig.stepper.follow(key(1), 0, &first[..2]);
    assert_eq!(rest(&mut rig, 0), after(&[], AHEAD + 2));
    // Otherwise.
    let other = [(first[2] + 1) % VOCAB as u32, 7, 8];
    rig.stepper.follow(key(1), 2, &other);
    let output = [&first[..2], &other].concat();
    assert_eq!(rest(&mut rig, 5), after(&output, AHEAD));
    // What makes no sense is not followed.
    rig.stepper.follow(key(1), 1000, &[1]);
    rig.stepper.follow(key(1), 5, &[VOCAB as u32]);
    assert_eq!(rest(&mut rig, 0)[..5], output);
}

#[test]
fn it_ends_neither_at_its_length_nor_at_a_stop_token() {
    let mut rig = rig();
    rig.submit(leading(1, 3)).unwrap();
    assert_eq!(rest(&mut rig, 0), after(&[], 3));
    rig.stepper.follow(key(1), 0, &[9, 9, 9, 9, 9]);
    assert_eq!(rest(&mut rig, 0), [9, 9, 9]);

    let stop = after(&[], 2)[1];
    let mut stops = leading(2, 100);
    (stops.key, stops.stopping.stop_tokens) = (key(1), vec![stop]);
    stops.sampling.seed = 1;
    let mut rig = self::rig();
    rig.submit(stops).unwrap();
    let output = rest(&mut rig, 0);
    assert_eq!(output.last(), Some(&stop));
    // The other one had none there, and goes on.
    rig.stepper
        .follow(key(1), output.len() - 1, &[(stop + 1) % VOCAB as u32]);
    assert!(rest(&mut rig, 0).len() > output.len());
}

#[test]
fn one_that_waits_for_those_that_rest_is_no_work() {
    let config = EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    };
    let mut rig = Rig::new(FakeBackend::new(64, spec(VOCAB, CONTEXT)), &config);
    rig.submit(leading(1, 100)).unwrap();
    rest(&mut rig, 0);
    let deadline = Some(rig.at(50));
    rig.submit(Request {
        deadline,
        ..leading(2, 100)
    })
    .unwrap();
    assert!(!rig.stepper.rests());
    step(&mut rig);
    assert!(rig.stepper.rests());
    // What comes is looked at, as far as it goes.
    rig.stepper.follow(key(1), 0, &[4]);
    assert!(!rig.stepper.rests());
    assert_eq!(rest(&mut rig, 0)[0], 4);
    // It is too late at last, or the other one ends.
    assert_eq!(
        rig.stepper.until_deadline(),
        Some(Duration::from_millis(50))
    );
    rig.set_time(50);
    assert_eq!(rig.stepper.until_deadline(), Some(Duration::ZERO));
    step(&mut rig);
    assert_eq!(rig.stepper.until_deadline(), None);
    rig.submit(leading(3, 100)).unwrap();
    step(&mut rig);
    rig.stepper.end(Finish::Cancelled, |s| s.key == key(1));
    assert!(!rig.stepper.rests());
    step(&mut rig);
    assert_eq!(rig.stepper.running(), 1);
}

proptest! {
    /// Whatever it is told, it says what would follow that.
    #[test]
    fn it_says_what_would_follow(
        told in proptest::collection::vec((proptest::option::of(0u32..50), 0usize..6), 1..12),
        penalty in 0.0f32..2.0,
    ) {
        let sampled = |mut request: Request| {
            request.sampling.frequency_penalty = penalty;
            request
        };
        let mut rig = rig();
        rig.submit(sampled(leading(1, 400))).unwrap();
        let mut output: Vec<u32> = Vec::new();
        for (wrong, steps) in told {
            for _ in 0..steps {
                step(&mut rig);
            }
            let mut resumed = sampled(request(1, vec![1, 2, 3], output.len() as u32 + 3));
            resumed.resume = output.clone();
            let mut made = alone(resumed, VOCAB, CONTEXT).tokens;
            made.splice(1..1, wrong);
            rig.stepper.follow(key(1), output.len(), &made);
            output.extend(made);
        }
        let mut resumed = sampled(request(1, vec![1, 2, 3], (output.len() + AHEAD) as u32));
        resumed.resume = output.clone();
        let expected = alone(resumed, VOCAB, CONTEXT).tokens;
        prop_assert_eq!(rest(&mut rig, output.len()), expected);
    }
}

#[test]
fn a_thread_with_nothing_but_those_that_rest_sleeps_and_drains() {
    struct Channel(std::sync::mpsc::Sender<SequenceOutput>);
    impl StepSink for Channel {
        fn publish(&mut self, _: u64, outputs: &mut Vec<SequenceOutput>, _: &crate::request::Load) {
            for output in outputs.drain(..) {
                let _ = self.0.send(output);
            }
        }
    }
    let backend = FakeBackend::new(64, spec(VOCAB, CONTEXT));
    let (send, outputs) = channel();
    let sink = Box::new(Channel(send));
    let handle = Engine::start(Box::new(backend), EngineConfig::default(), sink).unwrap();
    handle.submit(leading(1, 100)).unwrap();
    let next = || outputs.recv_timeout(Duration::from_secs(30)).unwrap();
    let said: Vec<u32> = (0..AHEAD).flat_map(|_| next().tokens).collect();
    assert_eq!(said, after(&[], AHEAD));
    handle.follow(key(1), 0, said[..1].to_vec());
    assert_eq!(next().offset as usize, AHEAD);
    handle.drain(None);
    assert_eq!(
        next().finish.map(|(finish, _)| finish),
        Some(Finish::Preempted)
    );
    assert!(handle.steps() < 50, "it slept");
}
