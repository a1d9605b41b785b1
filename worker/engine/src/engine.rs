//! The engine: a thread that runs steps, and the handle that others hold.

mod driver;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use shoal_core::{Class, TokenId};

pub use driver::{Driver, Turn};

use crate::backend::{Backend, NumericsId};
use crate::config::{ConfigError, EngineConfig, Limits};
use crate::metrics::EngineMetrics;
use crate::request::{Load, Request, SequenceKey, StepSink, SubmitError};
use crate::sequence::Sequence;
use crate::speculation::PushedDraft;
use crate::step::Stepper;

pub use crate::step::Clock;

/// Why no engine was started.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The settings are wrong.
    #[error("engine settings")]
    Config(#[from] ConfigError),
    /// The operating system gave no thread.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
}

impl EngineError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Config(error) => error.class(),
            Self::Thread(_) => Class::Fatal,
        }
    }
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Starts the engine's thread. It parks while there is nothing to do, and ends with
    /// [`EngineHandle::stop`] or with the last handle.
    pub fn start(
        backend: Box<dyn Backend>,
        config: EngineConfig,
        sink: Box<dyn StepSink>,
    ) -> Result<EngineHandle, EngineError> {
        let (handle, driver) = Self::driven(backend, config, sink, Box::new(Instant::now))?;
        let thread = thread::Builder::new()
            .name("engine".into())
            .spawn(move || driver.run())
            .map_err(EngineError::Thread)?;
        *lock(&handle.owner.thread) = Some(thread);
        Ok(handle)
    }

    /// An engine without a thread: the caller runs its steps, and `clock` times them.
    pub fn driven(
        backend: Box<dyn Backend>,
        config: EngineConfig,
        sink: Box<dyn StepSink>,
        clock: Clock,
    ) -> Result<(EngineHandle, Driver), EngineError> {
        let limits = Limits::resolve(&config, backend.as_ref())?;
        let metrics = EngineMetrics::default();
        let numerics = backend.numerics_id();
        let stepper = Stepper::new(backend, limits.clone(), metrics.clone(), clock);
        let shared = Arc::new(Shared {
            numerics,
            limits,
            started: Instant::now(),
            inbox: Mutex::default(),
            wake: Condvar::new(),
            steps: AtomicU64::new(0),
            load: Mutex::default(),
            expected: stepper.expected(),
            metrics,
        });
        let driver = Driver {
            shared: Arc::clone(&shared),
            stepper,
            sink,
        };
        let handle = EngineHandle {
            owner: Arc::new(Owner {
                shared,
                thread: Mutex::default(),
            }),
        };
        Ok((handle, driver))
    }
}

/// Access to a running engine. The engine stops when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the handles and the thread share.
#[derive(Debug)]
struct Shared {
    numerics: NumericsId,
    limits: Limits,
    started: Instant,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    steps: AtomicU64,
    expected: Arc<AtomicU64>,
    load: Mutex<Load>,
    metrics: EngineMetrics,
}

/// Commands that the thread has not seen yet, and what submissions are judged by.
#[derive(Debug, Default)]
struct Inbox {
    #[expect(clippy::vec_box, reason = "sequences change lists by pointer")]
    submitted: Vec<Box<Sequence>>,
    cancelled: Vec<SequenceKey>,
    /// The newest draft of each, of those that are live.
    drafts: HashMap<SequenceKey, PushedDraft>,
    /// What each of those that run ahead of others is told, of those that are live.
    told: HashMap<SequenceKey, Told>,
    /// Every sequence whose end is not published, and whether it was cancelled. Bounds the
    /// lists above.
    live: HashMap<SequenceKey, bool>,
    /// Of those, the ones that held pages after the last step.
    running: usize,
    ordinal: u64,
    drain: Option<Drain>,
    check: bool,
    stop: bool,
    /// Why the thread has ended.
    stopped: Option<String>,
}

/// What a sequence has from an output position on, for the one that runs ahead of it.
#[derive(Debug, Default)]
struct Told {
    base: usize,
    tokens: Vec<TokenId>,
}

impl Told {
    /// Adds what follows; what does not, or is more than a sequence of `most` tokens, takes the
    /// place of what there was.
    fn add(&mut self, base: usize, tokens: Vec<TokenId>, most: usize) {
        let end = self.base.checked_add(self.tokens.len());
        if end == Some(base) && self.tokens.len() + tokens.len() <= most {
            self.tokens.extend(tokens);
        } else {
            *self = Self { base, tokens };
        }
    }
}

impl Inbox {
    /// Whether there is nothing here that the thread has to see.
    fn is_empty(&self) -> bool {
        let asked = self.stop || self.check;
        !asked && self.submitted.is_empty() && self.cancelled.is_empty() && self.told.is_empty()
    }
}

#[derive(Clone, Copy, Debug)]
struct Drain {
    deadline: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EngineHandle {
    /// Queues a sequence. Everything it makes, its end included, goes to the sink.
    pub fn submit(&self, request: Request) -> Result<(), SubmitError> {
        let shared = &self.owner.shared;
        let now = Instant::now();
        let mut sequence = Sequence::new(request, &shared.limits, &shared.numerics, now)?;
        let mut inbox = lock(&shared.inbox);
        if let Some(reason) = &inbox.stopped {
            return Err(SubmitError::Stopped(reason.clone()));
        }
        if inbox.drain.is_some() || inbox.stop {
            return Err(SubmitError::Draining);
        }
        let limit = shared.limits.max_waiting;
        if inbox.live.len().saturating_sub(inbox.running) >= limit {
            return Err(SubmitError::Overloaded { limit });
        }
        if inbox.live.contains_key(&sequence.key) {
            return Err(SubmitError::Duplicate(sequence.key));
        }
        inbox.ordinal += 1;
        sequence.enter(
            inbox.ordinal,
            now.saturating_duration_since(shared.started),
            shared.limits.priority_aging,
        );
        inbox.live.insert(sequence.key, false);
        inbox.submitted.push(Box::new(sequence));
        drop(inbox);
        shared.wake.notify_one();
        Ok(())
    }

    /// Takes a draft that was made elsewhere. It replaces an earlier one of its sequence; what
    /// comes too late, twice or wrong costs nothing but its speed.
    pub fn draft(&self, key: SequenceKey, draft: PushedDraft) {
        let mut inbox = lock(&self.owner.shared.inbox);
        if inbox.live.contains_key(&key) {
            inbox.drafts.insert(key, draft);
        }
    }

    /// Tells a sequence that runs ahead of another one what that one has from an output position
    /// on.
    pub fn follow(&self, key: SequenceKey, base: u32, tokens: Vec<TokenId>) {
        let shared = &self.owner.shared;
        let (base, most) = (base as usize, shared.limits.sequence_tokens);
        let mut inbox = lock(&shared.inbox);
        if inbox.live.contains_key(&key) {
            inbox.told.entry(key).or_default().add(base, tokens, most);
        }
        drop(inbox);
        shared.wake.notify_one();
    }

    /// Ends a sequence with [`Finish::Cancelled`](crate::request::Finish) before the next step; without effect if it
    /// has ended already.
    pub fn cancel(&self, key: SequenceKey) {
        self.cancel_where(|other| other == key);
    }

    /// Cancels every sequence of a session.
    pub fn cancel_session(&self, session: u64) {
        self.cancel_where(|key| key.session == session);
    }

    fn cancel_where(&self, is_out: impl Fn(SequenceKey) -> bool) {
        let shared = &self.owner.shared;
        let mut inbox = lock(&shared.inbox);
        let Inbox {
            live, cancelled, ..
        } = &mut *inbox;
        for (&key, seen) in live
            .iter_mut()
            .filter(|(key, seen)| !**seen && is_out(**key))
        {
            *seen = true;
            cancelled.push(key);
        }
        drop(inbox);
        shared.wake.notify_one();
    }

    /// The load as of the last step.
    pub fn load(&self) -> Load {
        *lock(&self.owner.shared.load)
    }

    /// Steps published so far: an engine that hangs shows here.
    pub fn steps(&self) -> u64 {
        self.owner.shared.steps.load(Ordering::Relaxed)
    }

    /// What the running step is predicted to take; zero where none runs.
    pub fn expected_step(&self) -> Duration {
        Duration::from_micros(self.owner.shared.expected.load(Ordering::Relaxed))
    }

    /// Looks whether the backend is intact, and mends it if not, without waiting for a step to
    /// fail.
    pub fn check(&self) {
        lock(&self.owner.shared.inbox).check = true;
        self.owner.shared.wake.notify_one();
    }

    /// Takes no new sequences. Those still here at the deadline, if there is one, end with
    /// [`Finish::Preempted`](crate::request::Finish). A second call replaces the deadline.
    pub fn drain(&self, deadline: Option<Instant>) {
        lock(&self.owner.shared.inbox).drain = Some(Drain { deadline });
        self.owner.shared.wake.notify_one();
    }

    /// Takes new sequences again.
    pub fn undrain(&self) {
        lock(&self.owner.shared.inbox).drain = None;
    }

    /// Whether new sequences are refused.
    pub fn is_draining(&self) -> bool {
        lock(&self.owner.shared.inbox).drain.is_some()
    }

    /// Whether the end of every sequence has been published.
    pub fn is_idle(&self) -> bool {
        lock(&self.owner.shared.inbox).live.is_empty()
    }

    /// Why the engine has stopped, if it has.
    pub fn stopped(&self) -> Option<String> {
        lock(&self.owner.shared.inbox).stopped.clone()
    }

    /// Ends every sequence with [`Finish::Preempted`](crate::request::Finish), and the thread.
    pub fn stop(&self) {
        self.owner.stop();
    }

    /// The engine's metrics.
    pub fn metrics(&self) -> &EngineMetrics {
        &self.owner.shared.metrics
    }
}

impl Owner {
    fn stop(&self) {
        lock(&self.shared.inbox).stop = true;
        self.shared.wake.notify_one();
        let Some(thread) = lock(&self.thread).take() else {
            return;
        };
        // A sink may hold the last handle; a thread cannot wait for itself.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the engine's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_is_added_and_all_else_replaces() {
        let mut told = Told {
            base: 3,
            tokens: vec![1, 2],
        };
        let mut then = |base, tokens: &[TokenId]| {
            told.add(base, tokens.to_vec(), 4);
            (told.base, told.tokens.clone())
        };
        assert_eq!(then(5, &[3]), (3, vec![1, 2, 3]));
        // More than a sequence has.
        assert_eq!(then(6, &[4, 5]), (6, vec![4, 5]));
        // Once more, and a gap.
        assert_eq!(then(6, &[6]), (6, vec![6]));
        assert_eq!(then(9, &[7]), (9, vec![7]));
    }
}
