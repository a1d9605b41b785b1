//! Who may go to the workers now, who waits, and who is sent away at once.
//!
//! A request enters with a [`Ticket`] before any work is done for it and is admitted when
//! its sequences fit under `max_running`; among those that wait, the higher priority goes
//! first, then the earlier arrival. A full queue refuses with the time in which the waiting
//! work is predicted to drain.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::{error::RequestError, placement::Work};

/// Bounds of the router's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sequences at the workers.
    pub(crate) max_running: u32,
    /// Requests that wait for that.
    pub(crate) max_waiting: u32,
}

/// Tokens per second of all ready workers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Throughput {
    pub(crate) prefill: f64,
    pub(crate) decode: f64,
}

const SHORTEST_RETRY: f64 = 1.0;
const LONGEST_RETRY: f64 = 60.0;

impl Throughput {
    /// Predicted seconds to get through `work`.
    fn seconds(&self, work: &Work) -> f64 {
        let part = |tokens: f64, rate: f64| if rate > 0.0 { tokens / rate } else { 0.0 };
        part(work.prompt, self.prefill) + part(work.output, self.decode)
    }

    /// The same, as a time to try again after: between one second and a minute.
    pub(crate) fn drain_time(&self, work: &Work) -> Duration {
        let seconds = self.seconds(work);
        Duration::from_secs_f64(seconds.clamp(SHORTEST_RETRY, LONGEST_RETRY))
    }
}

/// Priority first, then arrival.
type Rank = (Reverse<u32>, u64);

#[derive(Debug)]
struct Waiter {
    sequences: u32,
    granted: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    running: u32,
    /// Requests that entered and are not admitted.
    entered: u32,
    arrivals: u64,
    queue: BTreeMap<Rank, Waiter>,
    waiting_work: Work,
    running_work: Work,
    /// Moving average of the tokens of finished sequences.
    output_tokens: Option<f64>,
}

/// Expected of a sequence before any has finished.
const PRIOR_OUTPUT: f64 = 128.0;
/// Weight of the newest observation in the moving average.
const LEARNING_RATE: f64 = 0.05;

/// The router's queue.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: Limits,
    state: Mutex<State>,
}

impl Admission {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        let state = Mutex::default();
        Arc::new(Self { limits, state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sequences at the workers.
    pub(crate) fn running(&self) -> u32 {
        self.lock().running
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> u32 {
        self.lock().entered
    }

    /// Everything that was taken and is not done.
    pub(crate) fn backlog(&self) -> Work {
        let state = self.lock();
        let mut work = state.waiting_work;
        work += state.running_work;
        work
    }

    /// A sequence ended after so many tokens.
    pub(crate) fn learn(&self, output_tokens: u32) {
        let mut state = self.lock();
        let new = f64::from(output_tokens);
        let average = state.output_tokens.unwrap_or(new);
        state.output_tokens = Some(average + LEARNING_RATE * (new - average));
    }

    /// Output tokens that a sequence of this limit is expected to have.
    pub(crate) fn expected_output(&self, max_tokens: u32) -> f64 {
        let average = self.lock().output_tokens.unwrap_or(PRIOR_OUTPUT);
        average.min(f64::from(max_tokens))
    }

    /// Takes a place in the queue, or refuses at once: where there is none, and where the queue
    /// is predicted to last until the deadline.
    pub(crate) fn enter(
        self: &Arc<Self>,
        throughput: Throughput,
        deadline: Instant,
    ) -> Result<Ticket, RequestError> {
        let mut state = self.lock();
        let free = self.limits.max_running.saturating_sub(state.running);
        let full = state.entered >= self.limits.max_waiting.saturating_add(free);
        let left = deadline.saturating_duration_since(Instant::now());
        if full || throughput.seconds(&state.waiting_work) > left.as_secs_f64() {
            let retry_after = throughput.drain_time(&state.waiting_work);
            return Err(RequestError::QueueFull { retry_after });
        }
        state.entered += 1;
        drop(state);
        Ok(Ticket {
            admission: self.clone(),
        })
    }

    /// A permit for a sequence that had one, lost it with its worker and goes on: it does not wait
    /// again, even where others have taken its place.
    pub(crate) fn readmit(self: &Arc<Self>, work: Work) -> Permit {
        let mut state = self.lock();
        state.running += 1;
        state.running_work += work;
        drop(state);
        Permit {
            admission: self.clone(),
            work,
        }
    }

    /// More choices than the limit run alone rather than never.
    fn fits(&self, running: u32, sequences: u32) -> bool {
        running == 0 || running + sequences <= self.limits.max_running
    }

    /// Admits whoever is first and fits, again and again.
    fn admit_waiting(&self, state: &mut State) {
        while let Some(first) = state.queue.first_entry() {
            let sequences = first.get().sequences;
            if !self.fits(state.running, sequences) {
                break;
            }
            state.running += sequences;
            // Should the waiter have left, its place gives the sequences back.
            let _ = first.remove().granted.send(());
        }
    }
}

/// A place in the queue; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Ticket {
    admission: Arc<Admission>,
}

impl Ticket {
    /// Waits until `sequences` of `work` each may go to the workers and returns a permit for
    /// each.
    pub(crate) async fn admit(
        self,
        sequences: u32,
        work: Work,
        priority: u32,
        deadline: Instant,
    ) -> Result<Vec<Permit>, RequestError> {
        let admission = self.admission.clone();
        let waiting = {
            let mut state = admission.lock();
            if state.queue.is_empty() && admission.fits(state.running, sequences) {
                state.running += sequences;
                None
            } else {
                let (granted, wait) = oneshot::channel();
                state.arrivals += 1;
                let rank = (Reverse(priority), state.arrivals);
                state.queue.insert(rank, Waiter { sequences, granted });
                state.waiting_work += work.times(sequences);
                let place = Place {
                    admission: admission.clone(),
                    rank,
                    sequences,
                    work,
                    admitted: false,
                };
                Some((place, wait))
            }
        };
        if let Some((mut place, wait)) = waiting {
            let granted = timeout_at(deadline, wait).await;
            let granted = granted.map_err(|_| RequestError::Deadline)?;
            // The sender lives in the queue, which outlives this place in it.
            granted.map_err(|_| RequestError::Draining)?;
            place.admitted = true;
        }
        admission.lock().running_work += work.times(sequences);
        let permit = || Permit {
            admission: admission.clone(),
            work,
        };
        Ok((0..sequences).map(|_| permit()).collect())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.lock().entered -= 1;
    }
}

/// A waiter's end of its place in the queue.
struct Place {
    admission: Arc<Admission>,
    rank: Rank,
    sequences: u32,
    work: Work,
    admitted: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        state.waiting_work -= self.work.times(self.sequences);
        if self.admitted {
            return;
        }
        if state.queue.remove(&self.rank).is_none() {
            // Granted between the last poll and this drop.
            state.running -= self.sequences;
        }
        self.admission.admit_waiting(&mut state);
    }
}

/// One sequence's right to be at a worker.
#[derive(Debug)]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    work: Work,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        state.running -= 1;
        state.running_work -= self.work;
        self.admission.admit_waiting(&mut state);
    }
}

#[cfg(test)]
mod tests;
