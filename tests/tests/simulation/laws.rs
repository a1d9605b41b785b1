//! The laws that every simulation must keep.

use std::time::Duration;

use tonic::Code;

use crate::{
    client::{End, Outcome},
    faults::{ROUTER, Schedule, host, is_well},
    trace::Trace,
    worker::{PORT, undisturbed},
    world::{Draws, FEW_WAITING, Report, TICK},
};

/// Attempts in a row without a new token that a sequence has at most after its first.
const MOST_FRUITLESS: usize = 3;
/// Moves of a sequence while it waits.
const MOST_MOVES: usize = 4;
/// A request takes no longer, queue and pauses included, where a worker is always well.
const LONGEST_ANSWER: Duration = Duration::from_secs(10);

/// The laws that the trace breaks.
pub(crate) fn check_trace(trace: &Trace) -> Vec<String> {
    let mut broken = trace.misplaced();
    let fruitless = trace.fruitless();
    if fruitless > MOST_FRUITLESS {
        broken.push(format!(
            "a sequence went on {fruitless} times without a token"
        ));
    }
    let moves = trace.moves();
    if moves > MOST_MOVES {
        broken.push(format!("a waiting sequence moved {moves} times"));
    }
    broken
}

/// The laws that clients, metrics and processes saw broken.
pub(crate) fn check(draws: &Draws, schedule: &Schedule, report: &Report) -> Vec<String> {
    let mut broken = Vec::new();
    let plans = report.outcomes.iter().map(|outcome| &outcome.plan);
    let expected = undisturbed::answers(plans);
    for outcome in &report.outcomes {
        let id = outcome.plan.id;
        if draws.rock && !outcome.plan.is_slow() && outcome.took > LONGEST_ANSWER {
            broken.push(format!("request {id} took {:?}", outcome.took));
        }
        for (choice, tokens) in (0..).zip(&outcome.tokens) {
            let expected = outcome.plan.answer(&expected[&(id, choice)]);
            let right = match outcome.end {
                End::Complete => tokens == expected,
                End::Failed(..) | End::Left => expected.starts_with(tokens),
            };
            if !right {
                let end = &outcome.end;
                broken.push(format!(
                    "request {id} got {tokens:?}, not {expected:?} ({end:?})"
                ));
            }
        }
        if let End::Failed(code, message) = &outcome.end
            && !may_fail(draws, schedule, outcome, *code)
        {
            let took = outcome.took;
            broken.push(format!(
                "request {id} failed after {took:?}: {code:?}, {message}"
            ));
        }
    }
    let [before, calm, after] = &report.looks[..] else {
        broken.push("the simulation did not come to its end".into());
        return broken;
    };
    for (when, look) in [("when all was quiet", calm), ("at the end", after)] {
        for (name, wanted) in [
            ("shoal_requests_running", 0.0),
            ("shoal_requests_waiting", 0.0),
            ("shoal_worker_sequences", 0.0),
            ("shoal_worker_suspected", 0.0),
            ("shoal_worker_up", 1.0),
            ("shoal_worker_ready", 1.0),
        ] {
            broken.extend(
                look.unlike(name, wanted)
                    .map(|line| format!("{when}: {line}")),
            );
        }
        for w in 0..draws.workers {
            let is_known = look
                .metrics
                .iter()
                .any(|(name, _)| name.contains(&worker_label(w)));
            if !is_known {
                broken.push(format!("{when}: {} is no worker", host(w)));
            }
            if look.sessions[w] != 1.0 {
                let open = look.sessions[w];
                broken.push(format!("{when}: {} has {open} sessions", host(w)));
            }
            if !look.idle[w] {
                broken.push(format!("{when}: {} has sequences of nobody", host(w)));
            }
        }
        let (now, then) = (look.tasks, before.tasks);
        if now > then {
            broken.push(format!(
                "{when}: the router has {now} tasks, {then} before the load"
            ));
        }
    }
    broken.extend(after.unlike("shoal_worker_breaker_open", 0.0));
    for w in 0..draws.workers {
        if calm.steps[w] == after.steps[w] {
            broken.push(format!("{} is not used again", host(w)));
        }
        if !report.finished.contains(&host(w)) {
            broken.push(format!("{} left tasks behind at its end", host(w)));
        }
    }
    if !report.finished.iter().any(|name| name == ROUTER) {
        broken.push("the router left tasks behind at its end".into());
    }
    broken
}

/// A worker in the labels of the router's metrics.
fn worker_label(worker: usize) -> String {
    format!("worker=\"{}:{PORT}\"", host(worker))
}

/// Whether a request may end with an error.
fn may_fail(draws: &Draws, schedule: &Schedule, outcome: &Outcome, code: Code) -> bool {
    let plan = &outcome.plan;
    match code {
        // The second is the word of the client's own clock.
        Code::DeadlineExceeded | Code::Cancelled => plan
            .deadline
            .is_some_and(|deadline| outcome.took + 2 * TICK >= deadline),
        // A queue that is too long for the deadline, or full.
        Code::ResourceExhausted => {
            plan.deadline.is_some() || draws.engine.max_waiting == FEW_WAITING
        }
        // There was nobody to answer it.
        Code::Unavailable => {
            let end = plan.at + outcome.took;
            !(0..draws.workers).any(|w| is_well(schedule, w, plan.at, end))
        }
        _ => false,
    }
}
