//! Growing pauses between attempts.

use std::time::Duration;

/// Exponential backoff, half of it random: processes that fail together do not come back
/// together.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses from `first`, doubled each time, up to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.longest);
        whole.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// The last attempt went well.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(10);

    #[test]
    fn pauses_double_up_to_a_limit_and_start_again() {
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let mut whole = FIRST;
        for _ in 0..20 {
            let pause = backoff.pause();
            assert!(
                pause >= whole / 2 && pause <= whole,
                "{pause:?} of {whole:?}"
            );
            whole = (whole * 2).min(LONGEST);
        }
        assert_eq!(whole, LONGEST);
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }

    #[test]
    fn pauses_are_jittered() {
        let first = || Backoff::new(FIRST, LONGEST).pause();
        let pauses: Vec<_> = (0..16).map(|_| first()).collect();
        assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    }
}
