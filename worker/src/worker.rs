//! The state of a worker: STARTING until its model has run once, then READY, or DRAINING.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use shoal_engine::engine::EngineHandle;
use shoal_fabric::shutdown::Shutdown;
use shoal_proto::worker::{ModelDescription, WorkerState};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::WorkerConfig, corpus::Corpora, group::Watch, metrics::WorkerMetrics, pages::Pages,
    sessions::Sessions, wire::Identity,
};

/// Between looks at an engine that drains.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// A loaded model and the engine that runs it.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) engine: EngineHandle,
    pub(crate) identity: Identity,
    /// All but the state.
    pub(crate) description: ModelDescription,
    /// The encoded `TokenizerBundle`.
    pub(crate) bundle: Bytes,
    /// Where ranks share the model.
    pub(crate) group: Option<Arc<Watch>>,
}

impl Serving {
    /// Names this start of the worker.
    pub(crate) fn set_epoch(&mut self, epoch: u64) {
        self.identity.epoch = epoch;
        self.description.epoch = epoch;
    }
}

/// What the parts of the service share.
#[derive(Debug)]
pub(crate) struct Worker {
    serving: OnceLock<Arc<Serving>>,
    state: watch::Sender<WorkerState>,
    /// The model has run and cannot at the moment. Changes under the lock of the state.
    broken: AtomicBool,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) pages: Arc<Pages>,
    pub(crate) corpora: Corpora,
    pub(crate) metrics: WorkerMetrics,
    pub(crate) shutdown: Shutdown,
    /// The sessions end.
    pub(crate) closing: CancellationToken,
}

/// The worker ends, or ends its loading in failure.
#[derive(Debug, thiserror::Error)]
#[error("the worker is shutting down")]
pub(crate) struct Closing;

impl Worker {
    pub(crate) fn new(config: &WorkerConfig, shutdown: Shutdown) -> Self {
        Self {
            serving: OnceLock::new(),
            state: watch::Sender::new(WorkerState::Starting),
            broken: AtomicBool::new(false),
            sessions: Arc::new(Sessions::new(config.max_sessions, config.session_backlog)),
            pages: Arc::default(),
            corpora: Corpora::new(config),
            metrics: WorkerMetrics::default(),
            shutdown,
            closing: CancellationToken::new(),
        }
    }

    /// The model has run: it is served from now on.
    pub(crate) fn ready(&self, serving: Serving) {
        // Set once: there is one load.
        self.serving.get_or_init(|| Arc::new(serving));
        self.state.send_replace(WorkerState::Ready);
    }

    pub(crate) fn watch(&self) -> watch::Receiver<WorkerState> {
        self.state.subscribe()
    }

    pub(crate) fn state(&self) -> WorkerState {
        *self.state.borrow()
    }

    /// The model, where it has run.
    pub(crate) fn known(&self) -> Option<&Serving> {
        self.serving.get().map(|serving| &**serving)
    }

    /// Waits for the model to have run once.
    pub(crate) async fn serving(&self) -> Result<Arc<Serving>, Closing> {
        let mut state = self.watch();
        tokio::select! {
            biased;
            () = self.closing.cancelled() => Err(Closing),
            // Whether it can run at the moment, the state tells.
            _ = state.wait_for(|_| self.serving.get().is_some()) => {
                self.serving.get().cloned().ok_or(Closing)
            }
        }
    }

    /// Whether the model cannot run at the moment, and nobody should send sequences.
    pub(crate) fn set_broken(&self, broken: bool) {
        // A worker that drains goes on so.
        self.state.send_if_modified(|state| {
            self.broken.store(broken, Ordering::Relaxed);
            let turns = *state != WorkerState::Draining && *state != self.undrained();
            if turns {
                *state = self.undrained();
            }
            turns
        });
    }

    /// The state of a worker that does not drain.
    fn undrained(&self) -> WorkerState {
        match self.broken.load(Ordering::Relaxed) {
            true => WorkerState::Starting,
            false => WorkerState::Ready,
        }
    }

    /// Takes no new sequences; those that are left at the deadline end as preempted.
    pub(crate) fn drain(&self, serving: &Serving, deadline: Option<Duration>) {
        let deadline = deadline.and_then(|d| Instant::now().checked_add(d));
        // Under the state's lock, so that state and engine agree.
        self.state.send_if_modified(|state| {
            if self.shutdown.is_started() {
                return false;
            }
            serving.engine.drain(deadline);
            std::mem::replace(state, WorkerState::Draining) != WorkerState::Draining
        });
    }

    /// Takes new sequences again, as soon as the model can run, unless the worker ends.
    pub(crate) fn undrain(&self, serving: &Serving) -> Result<(), Closing> {
        let mut result = Err(Closing);
        self.state.send_if_modified(|state| {
            if self.shutdown.is_started() {
                return false;
            }
            serving.engine.undrain();
            result = Ok(());
            let undrained = self.undrained();
            std::mem::replace(state, undrained) != undrained
        });
        result
    }

    /// Drains for good, and waits until the last sequence has ended. After the shutdown has
    /// started, so that nobody undrains.
    pub(crate) async fn finish(&self, engine: &EngineHandle, deadline: Duration) {
        self.state.send_modify(|state| {
            engine.drain(Instant::now().checked_add(deadline));
            *state = WorkerState::Draining;
        });
        // The engine tells nobody that it is idle; this is once in a worker's life.
        while !engine.is_idle() && engine.stopped().is_none() {
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }
}
