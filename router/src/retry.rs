//! How much may be tried again: a share of the requests, so that retries cannot feed an
//! overload (a token bucket, as Finagle's retry budget).

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// Retries that each request adds.
const RATIO: f64 = 0.2;
/// Retries per second whatever comes.
const RESERVE: f64 = 10.0;
/// Most that may be saved up.
const CAPACITY: f64 = 100.0;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct RetryBudget(Mutex<Balance>);

#[derive(Debug)]
struct Balance {
    retries: f64,
    at: Instant,
}

impl Balance {
    fn add(&mut self, retries: f64) {
        let now = Instant::now();
        let reserve = RESERVE * now.duration_since(self.at).as_secs_f64();
        self.at = now;
        self.retries = (self.retries + reserve + retries).min(CAPACITY);
    }
}

impl RetryBudget {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Balance {
            retries: CAPACITY,
            at: Instant::now(),
        }))
    }

    /// A request came.
    pub(crate) fn deposit(&self) {
        let mut balance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        balance.add(RATIO);
    }

    /// Whether something may be tried again.
    pub(crate) fn withdraw(&self) -> bool {
        let mut balance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        balance.add(0.0);
        let enough = balance.retries >= 1.0;
        if enough {
            balance.retries -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    fn spend(budget: &RetryBudget) -> usize {
        std::iter::repeat_with(|| budget.withdraw())
            .take_while(|&ok| ok)
            .count()
    }

    #[tokio::test(start_paused = true)]
    async fn retries_follow_the_requests() {
        let budget = RetryBudget::new();
        assert_eq!(spend(&budget), CAPACITY as usize);
        (0..51).for_each(|_| budget.deposit());
        assert_eq!(spend(&budget), 10);
        advance(Duration::from_millis(550)).await;
        assert_eq!(spend(&budget), 5);
        advance(Duration::from_secs(3600)).await;
        assert_eq!(spend(&budget), CAPACITY as usize);
    }
}
