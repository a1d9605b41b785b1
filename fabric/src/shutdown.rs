//! The orderly end of a process: one token that everybody watches, one tracker that knows
//! every task, and the signals that start it. Its start is told here too, for who started it.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How far a process has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phase {
    /// Where it listens, once it does.
    pub address: Option<SocketAddr>,
    /// Whether it has ever been ready to serve.
    pub ready: bool,
}

/// The end of a process, shared by its parts. Clones are the same shutdown.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tasks: TaskTracker,
    phase: Arc<watch::Sender<Phase>>,
}

impl Shutdown {
    /// A shutdown that only [`start`](Self::start) starts.
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown that SIGTERM or SIGINT starts. A second signal ends the process at once,
    /// with the shell's status for it (128 + signal).
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::new();
        let mut signals = Signals::install()?;
        let started = shutdown.clone();
        // Outside the tracker: it lives as long as the process.
        tokio::spawn(async move {
            let (name, _) = signals.next().await;
            tracing::info!(signal = name, "shutting down; a second signal ends at once");
            started.start();
            let (name, status) = signals.next().await;
            tracing::warn!(signal = name, "ended by a second signal");
            std::process::exit(status);
        });
        Ok(shutdown)
    }

    /// The process listens at `address`.
    pub fn listening(&self, address: SocketAddr) {
        self.phase
            .send_modify(|phase| phase.address = Some(address));
    }

    /// The process is ready to serve.
    pub fn ready(&self) {
        self.phase
            .send_if_modified(|phase| !std::mem::replace(&mut phase.ready, true));
    }

    /// How far the process has come, and a wake-up for each step.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Starts it. Idempotent.
    pub fn start(&self) {
        self.token.cancel();
    }

    /// Whether it has started.
    pub fn is_started(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it starts.
    pub async fn started(&self) {
        self.token.cancelled().await;
    }

    /// A token that is cancelled with the shutdown, or alone.
    pub fn token(&self) -> CancellationToken {
        self.token.child_token()
    }

    /// Spawns a task that the end of the process waits for.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// Waits for every spawned task, at most `bound`. False: some still ran then.
    pub async fn finished(&self, bound: Duration) -> bool {
        self.tasks.close();
        tokio::time::timeout(bound, self.tasks.wait()).await.is_ok()
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The next signal's name and the exit status that stands for it.
    async fn next(&mut self) -> (&'static str, i32) {
        tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", 128 + SignalKind::terminate().as_raw_value()),
            _ = self.interrupt.recv() => ("SIGINT", 128 + SignalKind::interrupt().as_raw_value()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn start_reaches_every_clone_and_child() {
        let shutdown = Shutdown::new();
        let (clone, child) = (shutdown.clone(), shutdown.token());
        assert!(!clone.is_started());
        shutdown.start();
        clone.started().await;
        child.cancelled().await;
    }

    #[tokio::test]
    async fn phases_are_seen_by_who_watches() {
        let shutdown = Shutdown::new();
        let mut phase = shutdown.phase();
        let address = ([127, 0, 0, 1], 80).into();
        shutdown.clone().listening(address);
        phase.changed().await.unwrap();
        shutdown.ready();
        phase.changed().await.unwrap();
        let reached = *phase.borrow_and_update();
        let expected = Phase {
            address: Some(address),
            ready: true,
        };
        assert_eq!(reached, expected);
        shutdown.ready();
        assert!(!phase.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_waits_for_tasks_but_not_for_ever() {
        let shutdown = Shutdown::new();
        let stop = shutdown.token();
        shutdown.spawn(async move { stop.cancelled().await });
        assert!(!shutdown.finished(Duration::from_secs(1)).await);
        shutdown.start();
        assert!(shutdown.finished(Duration::from_secs(1)).await);
    }
}
