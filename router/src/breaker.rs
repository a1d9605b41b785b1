//! Keeps sequences away from a worker that fails one after the other.
//!
//! A few failures in a row open the breaker for a while. Then one sequence at a time may try:
//! its first output closes the breaker, its failure opens it for twice as long. A refusal of a
//! wrong request or for want of room is no failure.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Failures in a row that open it.
const THRESHOLD: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Failures since the last success.
    failures: u32,
    /// Open, if at all, until then; half-open after it.
    until: Option<Instant>,
    pause: Duration,
    /// A sequence tries whether the worker is well again.
    probing: bool,
    /// Rises with every failure: what was let in before says nothing about what came after.
    generation: u64,
}

impl State {
    fn admits(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until && !self.probing)
    }

    fn fail(&mut self, now: Instant) {
        self.failures += 1;
        self.generation += 1;
        self.probing = false;
        if self.failures >= THRESHOLD {
            self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.until = Some(now + self.pause.mul_f64(rand::random_range(0.8..=1.0)));
        }
    }
}

impl Breaker {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a sequence could be let in now.
    pub(crate) fn admits(&self) -> bool {
        self.lock().admits(Instant::now())
    }

    /// Whether it keeps sequences away, or lets a single one try.
    pub(crate) fn is_open(&self) -> bool {
        self.lock().until.is_some()
    }

    /// Lets a sequence in.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Pass> {
        let mut state = self.lock();
        if !state.admits(Instant::now()) {
            return None;
        }
        state.probing = state.until.is_some();
        Some(Pass {
            generation: state.generation,
            probe: state.probing,
            breaker: self.clone(),
        })
    }

    /// The worker failed, whatever it was doing.
    pub(crate) fn fail(&self) {
        self.lock().fail(Instant::now());
    }
}

/// A sequence that was let in. Dropped without a verdict it says nothing, and gives the place
/// of the probe back.
#[derive(Debug)]
pub(crate) struct Pass {
    breaker: Arc<Breaker>,
    generation: u64,
    probe: bool,
}

impl Pass {
    /// Whether its verdict is what the open breaker waits for.
    pub(crate) fn probes(&self) -> bool {
        self.probe && self.breaker.lock().generation == self.generation
    }

    /// The worker made something of it.
    pub(crate) fn succeed(&mut self) {
        let mut state = self.breaker.lock();
        if state.generation == self.generation {
            let generation = state.generation;
            *state = State {
                generation,
                ..State::default()
            };
            self.probe = false;
        }
    }

    /// The worker failed it. What one failure does to many sequences counts once.
    pub(crate) fn fail(&mut self) {
        let mut state = self.breaker.lock();
        if state.generation == self.generation {
            state.fail(Instant::now());
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.probe {
            let mut state = self.breaker.lock();
            if state.generation == self.generation {
                state.probing = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn opened() -> Arc<Breaker> {
        let breaker = Arc::new(Breaker::default());
        for _ in 0..THRESHOLD {
            breaker.enter().unwrap().fail();
        }
        breaker
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_open_it_and_a_success_between_does_not() {
        let breaker = Arc::new(Breaker::default());
        for _ in 0..3 {
            for _ in 1..THRESHOLD {
                breaker.enter().unwrap().fail();
            }
            breaker.enter().unwrap().succeed();
        }
        assert!(!breaker.is_open());
        assert!(opened().enter().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_failure_of_many_sequences_counts_once() {
        let breaker = Arc::new(Breaker::default());
        let passes: Vec<_> = (0..32).map(|_| breaker.enter().unwrap()).collect();
        passes.into_iter().for_each(|mut pass| pass.fail());
        assert_eq!(breaker.lock().failures, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_at_a_time_and_its_success_closes() {
        let breaker = opened();
        advance(FIRST_PAUSE).await;
        let mut probe = breaker.enter().unwrap();
        assert!(probe.probes());
        assert!(!breaker.admits() && breaker.enter().is_none());
        probe.succeed();
        assert!(!probe.probes());
        assert!(!breaker.is_open() && breaker.enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_probe_opens_it_for_longer() {
        let breaker = opened();
        advance(FIRST_PAUSE).await;
        breaker.enter().unwrap().fail();
        advance(FIRST_PAUSE).await;
        assert!(breaker.enter().is_none());
        advance(FIRST_PAUSE).await;
        assert!(breaker.enter().is_some());
        for _ in 0..20 {
            breaker.fail();
        }
        advance(LONGEST_PAUSE).await;
        assert!(breaker.admits());
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_without_a_verdict_gives_its_place_back() {
        let breaker = opened();
        advance(FIRST_PAUSE).await;
        drop(breaker.enter().unwrap());
        let probe = breaker.enter().unwrap();
        breaker.fail();
        advance(2 * FIRST_PAUSE).await;
        let next = breaker.enter().unwrap();
        drop(probe);
        assert!(breaker.enter().is_none(), "the old probe frees nothing");
        drop(next);
    }
}
