//! Whether a worker lives: it speaks, and it makes steps while it has work.

use std::time::Duration;

use tokio::time::Instant;

/// A step may take so many times what it is predicted to.
const STEP_SLACK: u32 = 4;

/// Why a worker is suspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suspicion {
    /// It says nothing.
    Silent,
    /// It answers, but finishes no step although it has work.
    Stalled,
}

/// What is known of one worker's life signs.
#[derive(Debug)]
pub(crate) struct Watchdog {
    silence: Duration,
    stall: Duration,
    heard: Instant,
    step: u64,
    progress: Instant,
    /// Predicted time of the running step.
    expected: Duration,
    suspicion: Option<(Suspicion, Instant)>,
}

impl Watchdog {
    /// Suspects a worker that says nothing for `silence`, or makes no step for `stall` or a
    /// multiple of what the step is predicted to take.
    pub(crate) fn new(silence: Duration, stall: Duration) -> Self {
        let now = Instant::now();
        Self {
            silence,
            stall,
            heard: now,
            step: 0,
            progress: now,
            expected: Duration::ZERO,
            suspicion: None,
        }
    }

    /// Time between checks, with which a suspicion comes in good time.
    pub(crate) fn interval(&self) -> Duration {
        self.silence.min(self.stall) / 8
    }

    /// A frame came.
    pub(crate) fn hear(&mut self) {
        self.heard = Instant::now();
        self.clear(Suspicion::Silent);
    }

    /// A frame came that tells the steps finished so far.
    pub(crate) fn hear_step(&mut self, step: u64) {
        if step != self.step {
            self.step = step;
            self.progress = self.heard;
            self.clear(Suspicion::Stalled);
        }
    }

    /// A frame came that tells what the running step is predicted to take.
    pub(crate) fn hear_expected(&mut self, expected: Duration) {
        self.expected = expected;
    }

    fn clear(&mut self, what: Suspicion) {
        self.suspicion.take_if(|(suspicion, _)| *suspicion == what);
    }

    /// Looks at the clock. `due` is when this look was to be: one that comes late says that
    /// this process had no time, and nothing about the worker.
    pub(crate) fn check(&mut self, due: Instant, busy: bool) {
        let now = Instant::now();
        if self.suspicion.is_some() || now.duration_since(due) > self.interval() {
            return;
        }
        if !busy {
            self.progress = now;
        }
        let patience = self.stall.max(STEP_SLACK * self.expected);
        if now.duration_since(self.heard) > self.silence {
            self.suspicion = Some((Suspicion::Silent, now));
        } else if now.duration_since(self.progress) > patience {
            self.suspicion = Some((Suspicion::Stalled, now));
        }
    }

    /// Why the worker is suspected, and for how long it has been.
    pub(crate) fn suspicion(&self) -> Option<(Suspicion, Duration)> {
        self.suspicion.map(|(why, since)| (why, since.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn watchdog() -> Watchdog {
        Watchdog::new(400 * MS, 400 * MS)
    }

    async fn pass(dog: &mut Watchdog, time: Duration, busy: bool) -> Option<Suspicion> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            advance(dog.interval()).await;
            dog.check(Instant::now(), busy);
        }
        dog.suspicion().map(|(why, _)| why)
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_noticed_within_half_a_second_and_ends_with_a_word() {
        let mut dog = watchdog();
        assert_eq!(pass(&mut dog, 400 * MS, false).await, None);
        assert_eq!(
            pass(&mut dog, 100 * MS, false).await,
            Some(Suspicion::Silent)
        );
        dog.hear();
        assert_eq!(dog.suspicion(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_engine_answers_but_makes_no_step() {
        let mut dog = watchdog();
        let mut suspected = None;
        for _ in 0..4 {
            dog.hear();
            dog.hear_step(7);
            suspected = pass(&mut dog, 100 * MS, true).await;
        }
        assert_eq!(suspected, None, "the first step counted as one");
        dog.hear();
        assert_eq!(
            pass(&mut dog, 50 * MS, true).await,
            Some(Suspicion::Stalled)
        );
        // Neither its word nor the loss of its work clears it; only a step does.
        dog.hear();
        dog.hear_step(7);
        assert!(pass(&mut dog, 100 * MS, false).await.is_some());
        dog.hear_step(8);
        assert_eq!(dog.suspicion(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_worker_need_not_step_and_a_long_step_may_be_long() {
        let mut dog = watchdog();
        for _ in 0..20 {
            dog.hear();
            assert_eq!(pass(&mut dog, 100 * MS, false).await, None);
        }
        dog.hear_expected(500 * MS);
        for _ in 0..19 {
            dog.hear();
            assert_eq!(pass(&mut dog, 100 * MS, true).await, None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_look_blames_nobody() {
        let mut dog = watchdog();
        let due = Instant::now() + 50 * MS;
        advance(5000 * MS).await;
        dog.check(due, true);
        assert_eq!(dog.suspicion(), None);
    }
}
