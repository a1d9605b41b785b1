//! How quick a group's exchanges are.

use std::time::{Duration, Instant};

use crate::{Collective, CollectiveError};

/// Exchanges of each kind that are timed; the middle one counts.
const ROUNDS: usize = 15;
/// Numbers of a large exchange.
const LARGE: usize = 1 << 16;

/// What an exchange takes: a time for any, and more for each number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Of one number: half a round trip, and what the ranks do about it.
    pub latency: Duration,
    /// Numbers of a part that pass in a second.
    pub rate: f64,
}

impl Pace {
    /// Times exchanges of up to `words` numbers. All ranks do it at the same time.
    ///
    /// # Errors
    /// As those of an exchange.
    pub fn measure(group: &mut dyn Collective, words: usize) -> Result<Self, CollectiveError> {
        let large = words.clamp(2, LARGE);
        let latency = median(group, 1)?;
        let more = median(group, large)?.saturating_sub(latency);
        Ok(Self {
            latency,
            rate: (large - 1) as f64 / more.as_secs_f64().max(1e-9),
        })
    }

    /// Of an exchange of `words` numbers.
    pub fn exchange(&self, words: usize) -> Duration {
        self.latency + Duration::from_secs_f64(words as f64 / self.rate)
    }
}

fn median(group: &mut dyn Collective, words: usize) -> Result<Duration, CollectiveError> {
    let mut times = [Duration::ZERO; ROUNDS];
    for time in &mut times {
        let started = Instant::now();
        group.part(words)?.fill(0.0);
        group.exchange()?;
        *time = started.elapsed();
    }
    times.sort();
    Ok(times[ROUNDS / 2])
}
