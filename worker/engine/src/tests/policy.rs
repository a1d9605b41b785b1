//! Who runs when, and who ends how.

use std::sync::atomic::Ordering;

use shoal_core::Speculation;

use super::fake::{FakeBackend, Fault, Probe, spec};
use super::rig::{Rig, key, request};
use crate::config::EngineConfig;
use crate::request::{Finish, SubmitError};

fn rig(pages: u32, config: EngineConfig) -> (Rig, Probe) {
    let backend = FakeBackend::new(pages, spec(40, 1024));
    let probe = backend.probe();
    (Rig::new(backend, &config), probe)
}

fn one_at_a_time() -> EngineConfig {
    EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    }
}

/// Sequences in the order in which they ended.
fn order(rig: &mut Rig, ids: &[u64]) -> Vec<u64> {
    let mut order = Vec::new();
    while order.len() < ids.len() {
        rig.step();
        for &id in ids {
            let ended = rig
                .collected
                .get(&key(id))
                .is_some_and(|c| c.finish.is_some());
            if ended && !order.contains(&id) {
                order.push(id);
            }
        }
    }
    order
}

#[test]
fn higher_priorities_run_first_and_equals_in_turn() {
    let (mut rig, _) = rig(8, one_at_a_time());
    for (id, priority) in [(1, 0), (2, 5), (3, 1), (4, 5)] {
        let mut one = request(id, vec![1; 10], 3);
        one.priority = priority;
        rig.submit(one).unwrap();
    }
    assert_eq!(order(&mut rig, &[1, 2, 3, 4]), [2, 4, 3, 1]);
}

#[test]
fn waiting_outweighs_priority_in_the_end() {
    let (mut rig, _) = rig(8, one_at_a_time());
    rig.submit(request(1, vec![1], 3)).unwrap();
    let urgent = |id| {
        let mut one = request(id, vec![1], 3);
        one.priority = 2;
        one
    };
    // A level is worth 10 s.
    rig.set_time(19_000);
    rig.submit(urgent(2)).unwrap();
    rig.set_time(21_000);
    rig.submit(urgent(3)).unwrap();
    assert_eq!(order(&mut rig, &[1, 2, 3]), [2, 1, 3]);
}

#[test]
fn a_higher_priority_takes_the_place_of_a_lower() {
    let (mut rig, _) = rig(8, one_at_a_time());
    rig.submit(request(1, vec![1; 40], 50)).unwrap();
    rig.step();
    let mut urgent = request(2, vec![2; 40], 5);
    urgent.priority = 1;
    rig.submit(urgent).unwrap();
    assert_eq!(order(&mut rig, &[1, 2]), [2, 1]);
    assert_eq!(rig.of(1).finish.unwrap().1.preemptions, 1);
    assert_eq!(rig.of(2).finish.unwrap().1.preemptions, 0);
}

#[test]
fn broken_off_answers_are_taken_up_first_and_in_longer_steps() {
    let config = EngineConfig {
        speculation: Speculation::Off,
        ..EngineConfig::default()
    };
    let (mut rig, probe) = rig(64, config);
    probe.row_time.store(1, Ordering::Relaxed);
    rig.submit(request(1, vec![1], 900)).unwrap();
    rig.submit(request(2, vec![2; 300], 50)).unwrap();
    order(&mut rig, &[2]);
    let rows = |rig: &mut Rig| {
        let before = probe.prompt_rows.load(Ordering::Relaxed);
        rig.step();
        probe.prompt_rows.load(Ordering::Relaxed) - before
    };
    rig.submit(request(3, vec![3; 300], 5)).unwrap();
    rig.submit(request(4, vec![4; 300], 5)).unwrap();
    let usual = rows(&mut rig);
    let mut broken_off = request(5, vec![5; 300], 10);
    broken_off.resume = vec![5; 5];
    rig.submit(broken_off).unwrap();
    let longer = rows(&mut rig);
    assert!((30..50).contains(&usual), "{usual} rows of 1 ms");
    assert!((75..100).contains(&longer), "{longer} rows of 1 ms");
    assert_eq!(order(&mut rig, &[4, 5]), [5, 4]);
}

#[test]
fn pages_are_taken_from_the_lowest_priority() {
    // Three of 3 pages at their ends, in 6 pages.
    let (mut rig, _) = rig(6, EngineConfig::default());
    for (id, priority) in [(1, 1), (2, 0), (3, 2)] {
        let mut one = request(id, vec![id as u32; 30], 60);
        one.priority = priority;
        rig.submit(one).unwrap();
    }
    rig.run();
    let preemptions = |id| rig.of(id).finish.unwrap().1.preemptions;
    assert_eq!((preemptions(1), preemptions(3)), (0, 0));
    assert!(preemptions(2) > 0);
}

#[test]
fn deadlines_end_the_waiting_and_the_running() {
    let (mut rig, probe) = rig(8, one_at_a_time());
    for (id, deadline) in [(1, 100), (2, 50), (3, 500)] {
        let mut one = request(id, vec![1], 20);
        one.deadline = Some(rig.at(deadline));
        rig.submit(one).unwrap();
    }
    rig.step();
    rig.set_time(60);
    rig.step();
    assert_eq!(rig.of(2).finish(), Some(Finish::Deadline));
    assert!(rig.of(2).tokens.is_empty());
    assert_eq!(rig.of(1).finish(), None);
    rig.set_time(100);
    rig.step();
    assert_eq!(rig.of(1).finish(), Some(Finish::Deadline));
    assert_eq!(rig.of(1).tokens.len(), 2);
    rig.run();
    assert_eq!(rig.of(3).finish(), Some(Finish::Length));
    // One prompt row each for 1 and 3, none for 2.
    assert_eq!(
        probe.prompt_rows.load(std::sync::atomic::Ordering::Relaxed),
        2
    );
}

#[test]
fn cancelled_pages_are_free_at_once() {
    let (mut rig, _) = rig(8, EngineConfig::default());
    rig.submit(request(1, vec![1; 200], 20)).unwrap();
    rig.step();
    let usage = |rig: &mut Rig| rig.stepper.output().1.kv_usage;
    assert_eq!(usage(&mut rig), 7.0 / 8.0);
    rig.cancel(1);
    assert_eq!(usage(&mut rig), 0.0);
    assert_eq!(rig.of(1).finish(), Some(Finish::Cancelled));
    assert!(rig.stepper.is_empty());
}

#[test]
fn decoding_goes_on_beside_a_long_prompt() {
    let (mut rig, probe) = rig(
        64,
        EngineConfig {
            step_rows: 40,
            ..EngineConfig::default()
        },
    );
    rig.submit(request(1, vec![1], 100)).unwrap();
    rig.step();
    rig.submit(request(2, vec![2; 400], 1)).unwrap();
    let before = rig.of(1).tokens.len();
    let mut steps = 0;
    while !rig.collected.contains_key(&key(2)) {
        rig.step();
        steps += 1;
    }
    assert_eq!(rig.of(1).tokens.len(), before + steps);
    assert_eq!(steps, 400usize.div_ceil(39));
    assert_eq!(
        probe.most_rows.load(std::sync::atomic::Ordering::Relaxed),
        40
    );
}

#[test]
fn a_prefix_in_the_making_is_waited_for() {
    let (mut rig, probe) = rig(64, EngineConfig::default());
    for id in 0..32 {
        let mut prompt = vec![5; 165];
        prompt.push(id as u32);
        rig.submit(request(id, prompt, 4)).unwrap();
    }
    rig.run();
    // 160 tokens are computed once, 6 by each.
    let rows = probe.prompt_rows.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(rows, 160 + 32 * 6);
}

#[test]
fn output_ends_where_the_context_does() {
    let (mut rig, _) = rig(2, EngineConfig::default());
    rig.submit(request(1, vec![1; 60], 100)).unwrap();
    rig.submit(request(2, vec![1; 64], 100)).unwrap();
    rig.run();
    assert_eq!(rig.of(1).tokens.len(), 4);
    assert_eq!(rig.of(1).finish(), Some(Finish::Length));
    assert_eq!(rig.of(2).tokens.len(), 0);
    assert_eq!(rig.of(2).finish(), Some(Finish::Length));
    let refused = rig.submit(request(3, vec![1; 65], 1));
    assert_eq!(
        refused,
        Err(SubmitError::PromptTooLong {
            tokens: 65,
            limit: 64
        })
    );
    for (max_tokens, limit) in [(2, 2), (100, 3)] {
        let mut more = request(4, vec![1; 61], max_tokens);
        more.resume = vec![1; limit + 1];
        let refused = Err(SubmitError::OutputTooLong {
            tokens: limit + 1,
            limit,
        });
        assert_eq!(rig.submit(more), refused);
    }
}

#[test]
fn a_failed_step_ends_its_sequences_and_no_other() {
    let (mut rig, probe) = rig(8, one_at_a_time());
    rig.submit(request(1, vec![1; 40], 20)).unwrap();
    rig.submit(request(2, vec![1; 40], 20)).unwrap();
    rig.step();
    probe.faults.lock().unwrap().push_back(Fault::Retry);
    rig.step();
    assert_eq!(rig.of(1).finish(), Some(Finish::Preempted));
    assert_eq!(rig.of(1).tokens.len(), 1);
    rig.run();
    assert_eq!(rig.of(2).finish(), Some(Finish::Length));
    assert_eq!(rig.metrics.failed_steps.get(), 1);
}

#[test]
fn bad_logits_end_their_sequence_alone() {
    let (mut rig, probe) = rig(8, EngineConfig::default());
    rig.submit(request(1, vec![1], 5)).unwrap();
    rig.submit(request(2, vec![2], 5)).unwrap();
    probe.faults.lock().unwrap().push_back(Fault::Nan);
    rig.run();
    assert_eq!(rig.of(1).finish(), Some(Finish::Preempted));
    assert!(rig.of(1).tokens.is_empty());
    assert_eq!(rig.of(2).finish(), Some(Finish::Length));
    assert_eq!(rig.of(2).tokens.len(), 5);
}

#[test]
fn stop_tokens_wait_for_the_least_length() {
    let (mut rig, _) = rig(8, EngineConfig::default());
    let mut one = request(1, vec![1], 50);
    one.stopping.stop_tokens = (0..39).collect();
    one.stopping.min_tokens = 7;
    rig.submit(one).unwrap();
    rig.run();
    let tokens = &rig.of(1).tokens;
    assert!(tokens[..7].iter().all(|&token| token == 39), "{tokens:?}");
    let last = *tokens.last().unwrap();
    assert!(last < 39 && tokens.len() > 7);
    assert_eq!(rig.of(1).finish(), Some(Finish::Stop));
}

#[test]
fn times_and_counts_are_told() {
    let (mut rig, _) = rig(8, one_at_a_time());
    rig.submit(request(1, vec![1; 70], 2)).unwrap();
    rig.submit(request(2, vec![1; 70], 2)).unwrap();
    let load = rig.stepper.output().1;
    assert_eq!((load.waiting, load.waiting_uncached_tokens), (2, 140));
    rig.step();
    rig.set_time(30);
    rig.run();
    let (_, usage) = rig.of(2).finish.unwrap();
    assert_eq!(usage.queued.as_millis(), 30);
    assert_eq!(usage.cached_tokens, 64);
    assert_eq!(rig.metrics.prefix_hits.get(), 64);
    assert_eq!(rig.metrics.prefix_queries.get(), 140);
    assert_eq!(rig.metrics.decode_tokens.get(), 4);
    assert_eq!(rig.metrics.prefill_tokens.get(), 70 + 6);
}

#[test]
fn cached_pages_are_not_counted_as_room_for_their_own_sequence() {
    let (mut rig, _) = rig(8, EngineConfig::default());
    let shared = vec![1; 128];
    rig.submit(request(1, shared.clone(), 1)).unwrap();
    rig.run();
    // Four idle pages, three held, one free: six are needed, of which four are the idle ones.
    rig.submit(request(2, vec![2; 70], 20)).unwrap();
    rig.step();
    let long: Vec<u32> = shared.into_iter().chain(vec![3; 40]).collect();
    rig.submit(request(3, long, 2)).unwrap();
    rig.step();
    let load = rig.stepper.output().1;
    assert_eq!((load.running, load.waiting), (1, 1));
    rig.run();
    assert_eq!(rig.of(3).tokens.len(), 2);
}

#[test]
fn a_step_that_takes_pages_away_admits_nobody() {
    // Both outgrow their pages in the same step, and one page is left for the first.
    let (mut rig, _) = rig(3, EngineConfig::default());
    rig.submit(request(1, vec![1; 31], 30)).unwrap();
    rig.submit(request(2, vec![2; 31], 30)).unwrap();
    rig.step();
    rig.step();
    let mut urgent = request(3, vec![3], 30);
    urgent.priority = 9;
    rig.submit(urgent).unwrap();
    let mut preempted = false;
    while !rig.stepper.is_empty() {
        let before = (rig.stepper.running(), rig.metrics.preemptions.get());
        rig.step();
        let after = (rig.stepper.running(), rig.metrics.preemptions.get());
        if after.1 > before.1 {
            preempted = true;
            assert!(after.0 < before.0, "{before:?}, {after:?}");
        }
    }
    assert!(preempted);
}
