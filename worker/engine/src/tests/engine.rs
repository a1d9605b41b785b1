//! The handle and the thread.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use shoal_core::PAGE_TOKENS;

use super::fake::{FakeBackend, Fault, Probe, spec};
use super::rig::{alone, key, request};
use crate::config::{ConfigError, EngineConfig};
use crate::engine::{Engine, EngineError, EngineHandle};
use crate::request::{Finish, Load, SequenceOutput, StepSink, SubmitError};

struct Channel(Sender<SequenceOutput>);

impl StepSink for Channel {
    fn publish(&mut self, _step: u64, outputs: &mut Vec<SequenceOutput>, _load: &Load) {
        for output in outputs.drain(..) {
            // A test that has seen enough hangs up.
            let _ = self.0.send(output);
        }
    }
}

/// More tokens than any test waits for: the fake backend takes quadratic time.
const ENDLESS: u32 = 200_000;
const CONTEXT: usize = 6250 * PAGE_TOKENS;

fn start(config: EngineConfig) -> (EngineHandle, Receiver<SequenceOutput>, Probe) {
    let backend = FakeBackend::new(6250, spec(50, CONTEXT));
    let probe = backend.probe();
    let (send, receive) = channel();
    let handle = Engine::start(Box::new(backend), config, Box::new(Channel(send))).unwrap();
    (handle, receive, probe)
}

fn until_end(outputs: &Receiver<SequenceOutput>, id: u64) -> (Vec<u32>, Finish) {
    let mut tokens = Vec::new();
    loop {
        let output = outputs.recv_timeout(Duration::from_secs(30)).unwrap();
        if output.key == key(id) {
            tokens.extend(output.tokens);
            if let Some((finish, _)) = output.finish {
                return (tokens, finish);
            }
        }
    }
}

#[test]
fn a_sequence_runs_to_its_length() {
    let (handle, outputs, _) = start(EngineConfig::default());
    handle.submit(request(1, vec![1, 2, 3], 20)).unwrap();
    let (tokens, finish) = until_end(&outputs, 1);
    assert_eq!(finish, Finish::Length);
    assert_eq!(
        tokens,
        alone(request(1, vec![1, 2, 3], 20), 50, 1024).tokens
    );
    handle.stop();
    assert!(handle.is_idle());
    assert!(handle.steps() >= 20);
    assert_eq!(handle.metrics().decode_tokens.get(), 20);
}

#[test]
fn bad_requests_are_refused() {
    let (handle, _outputs, _) = start(EngineConfig::default());
    let refused = |request| handle.submit(request).unwrap_err();
    assert_eq!(refused(request(1, vec![], 1)), SubmitError::EmptyPrompt);
    assert_eq!(
        refused(request(1, vec![50], 1)),
        SubmitError::UnknownToken {
            token: 50,
            vocab: 50
        }
    );
    assert_eq!(
        refused(request(1, vec![1; CONTEXT + 1], 1)),
        SubmitError::PromptTooLong {
            tokens: CONTEXT + 1,
            limit: CONTEXT
        }
    );
    let mut bad = request(1, vec![1], 1);
    bad.sampling.temperature = f32::NAN;
    assert!(matches!(refused(bad), SubmitError::Param(_)));
    assert!(handle.is_idle());
}

#[test]
fn settings_of_zero_are_refused() {
    let config = EngineConfig {
        step_rows: 0,
        ..EngineConfig::default()
    };
    let (send, _receive) = channel();
    let backend = Box::new(FakeBackend::new(1, spec(50, 64)));
    let error = Engine::start(backend, config, Box::new(Channel(send))).unwrap_err();
    let EngineError::Config(error) = error else {
        panic!("{error}");
    };
    assert_eq!(error, ConfigError::Zero("step_rows"));
}

#[test]
fn cancelled_sequences_end() {
    let (handle, outputs, _) = start(EngineConfig::default());
    handle.submit(request(1, vec![1], ENDLESS)).unwrap();
    handle.submit(request(2, vec![2], ENDLESS)).unwrap();
    handle.cancel(key(1));
    assert_eq!(until_end(&outputs, 1).1, Finish::Cancelled);
    handle.cancel_session(1);
    assert_eq!(until_end(&outputs, 2).1, Finish::Cancelled);
    handle.cancel(key(2));
    handle.submit(request(3, vec![3], 2)).unwrap();
    assert_eq!(until_end(&outputs, 3).1, Finish::Length);
}

#[test]
fn drained_engines_refuse_and_give_up_at_the_deadline() {
    let (handle, outputs, _) = start(EngineConfig::default());
    handle.submit(request(1, vec![1], ENDLESS)).unwrap();
    handle.drain(None);
    assert!(handle.is_draining());
    let refused = handle.submit(request(2, vec![1], 1));
    assert_eq!(refused, Err(SubmitError::Draining));
    handle.drain(Some(Instant::now()));
    assert_eq!(until_end(&outputs, 1).1, Finish::Preempted);
    handle.undrain();
    handle.submit(request(2, vec![1], 1)).unwrap();
    assert_eq!(until_end(&outputs, 2).1, Finish::Length);
}

#[test]
fn a_full_queue_refuses() {
    let (handle, outputs, probe) = start(EngineConfig {
        max_waiting: 2,
        max_running: 1,
        ..EngineConfig::default()
    });
    // The backend waits for this lock, so the queue stands still.
    let faults = probe.faults.lock().unwrap();
    handle.submit(request(1, vec![1], 2)).unwrap();
    handle.submit(request(2, vec![1], 2)).unwrap();
    let duplicate = handle.submit(request(2, vec![1], 2));
    let third = handle.submit(request(3, vec![1], 2));
    drop(faults);
    assert_eq!(third, Err(SubmitError::Overloaded { limit: 2 }));
    assert_eq!(duplicate, Err(SubmitError::Overloaded { limit: 2 }));
    assert_eq!(until_end(&outputs, 2).1, Finish::Length);
}

#[test]
fn names_are_taken_once() {
    let (handle, outputs, probe) = start(EngineConfig::default());
    let faults = probe.faults.lock().unwrap();
    handle.submit(request(1, vec![1], 2)).unwrap();
    let again = handle.submit(request(1, vec![1], 2));
    drop(faults);
    assert_eq!(again, Err(SubmitError::Duplicate(key(1))));
    until_end(&outputs, 1);
}

#[test]
fn broken_backends_stop_the_engine() {
    for fault in [Fault::Fatal, Fault::Panic] {
        let (handle, outputs, probe) = start(EngineConfig::default());
        probe.faults.lock().unwrap().push_back(fault);
        handle.submit(request(1, vec![1], 5)).unwrap();
        assert_eq!(until_end(&outputs, 1).1, Finish::Preempted);
        handle.stop();
        assert!(handle.stopped().is_some());
        assert!(handle.is_idle());
        let refused = handle.submit(request(2, vec![1], 5));
        assert!(matches!(refused, Err(SubmitError::Stopped(_))));
    }
}

#[test]
fn stopping_ends_what_is_left_and_dropping_stops() {
    let (handle, outputs, _) = start(EngineConfig::default());
    handle.submit(request(1, vec![1], ENDLESS)).unwrap();
    drop(handle);
    assert_eq!(until_end(&outputs, 1).1, Finish::Preempted);
    // The sink is gone with the thread.
    assert!(outputs.recv().is_err());
}

#[test]
fn lost_pages_end_their_sequences_and_no_others() {
    let (handle, outputs, probe) = start(EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    });
    let prompt = vec![7; 2 * PAGE_TOKENS + 1];
    handle.submit(request(1, prompt.clone(), 2)).unwrap();
    assert_eq!(until_end(&outputs, 1).1, Finish::Length);
    let mut faults = probe.faults.lock().unwrap();
    handle.submit(request(2, vec![1], ENDLESS)).unwrap();
    handle.submit(request(3, vec![1, 2], 20)).unwrap();
    faults.push_back(Fault::Lost);
    drop(faults);
    assert_eq!(until_end(&outputs, 2).1, Finish::Preempted);
    let (tokens, finish) = until_end(&outputs, 3);
    assert_eq!(finish, Finish::Length);
    assert_eq!(tokens, alone(request(3, vec![1, 2], 20), 50, 1024).tokens);
    assert_eq!(probe.recoveries.load(Ordering::Relaxed), 1);
    // Nothing of the prompt is cached any more.
    let before = probe.prompt_rows.load(Ordering::Relaxed);
    handle.submit(request(4, prompt.clone(), 2)).unwrap();
    assert_eq!(until_end(&outputs, 4).1, Finish::Length);
    let computed = probe.prompt_rows.load(Ordering::Relaxed) - before;
    assert_eq!(computed, prompt.len());
}

#[test]
fn an_idle_engine_is_mended_before_its_next_step() {
    let (handle, outputs, probe) = start(EngineConfig::default());
    handle.check();
    handle.submit(request(1, vec![1], 2)).unwrap();
    assert_eq!(until_end(&outputs, 1).1, Finish::Length);
    assert_eq!(probe.recoveries.load(Ordering::Relaxed), 0, "it was intact");
    probe.lost.store(true, Ordering::Relaxed);
    handle.check();
    handle.submit(request(2, vec![1], 2)).unwrap();
    assert_eq!(until_end(&outputs, 2).1, Finish::Length);
    assert_eq!(probe.recoveries.load(Ordering::Relaxed), 1);
}

#[test]
fn an_engine_that_waits_for_its_backend_keeps_no_sequence() {
    let (handle, outputs, probe) = start(EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    });
    probe.away.store(true, Ordering::Relaxed);
    let mut faults = probe.faults.lock().unwrap();
    handle.submit(request(1, vec![1], ENDLESS)).unwrap();
    handle.submit(request(2, vec![1], ENDLESS)).unwrap();
    faults.push_back(Fault::Lost);
    drop(faults);
    // Who ran, who waited, and who comes meanwhile.
    for number in 1..=3 {
        if number == 3 {
            handle.submit(request(3, vec![1], 2)).unwrap();
        }
        assert_eq!(until_end(&outputs, number).1, Finish::Preempted);
    }
    assert_eq!(probe.recoveries.load(Ordering::Relaxed), 0);
    probe.away.store(false, Ordering::Relaxed);
    // It may still be on its way back.
    let end = (4..).find_map(|number| {
        handle.submit(request(number, vec![1], 2)).unwrap();
        let (_, finish) = until_end(&outputs, number);
        (finish != Finish::Preempted).then_some(finish)
    });
    assert_eq!(end, Some(Finish::Length));
    assert_eq!(probe.recoveries.load(Ordering::Relaxed), 1);

    probe.away.store(true, Ordering::Relaxed);
    probe.lost.store(true, Ordering::Relaxed);
    handle.check();
    handle.stop();
    assert!(handle.stopped().is_some());
}
