//! Keeps one role alive: starts its process, starts it again when it crashes, ends it in order.

use std::io;
use std::net::SocketAddr;
use std::process::ExitStatus;
use std::time::Duration;

use shoal_fabric::backoff::Backoff;
use shoal_fabric::membership::Member;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::child::{Child, Launch, Next};
use super::control::{Order, Report};

/// Between restarts.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Something happened to the process of slot `slot`.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) slot: usize,
    pub(super) what: What,
}

/// What happened.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum What {
    Listening(SocketAddr),
    Ready,
    /// It will start again.
    Gone,
}

/// Why a role could not be kept alive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeepError {
    #[error("{name} cannot be started")]
    Spawn { name: String, source: io::Error },
    #[error("{name} cannot be watched")]
    Wait { name: String, source: io::Error },
    #[error("{name} failed to start: {reason}")]
    Start { name: String, reason: String },
}

/// How processes are told to end.
#[derive(Clone)]
pub(super) struct Stop {
    /// Finish what runs, then end.
    pub(super) drain: CancellationToken,
    /// End now.
    pub(super) kill: CancellationToken,
    /// From drain to kill.
    pub(super) patience: Duration,
}

/// One role's process, and its successors.
pub(super) struct Keeper {
    pub(super) slot: usize,
    pub(super) launch: Launch,
    pub(super) events: mpsc::Sender<Event>,
    /// Passed on as orders, where there is one.
    pub(super) workers: Option<watch::Receiver<Vec<Member>>>,
    pub(super) stop: Stop,
}

/// How a process ended.
struct End {
    status: ExitStatus,
    was_ready: bool,
    /// Its own word on why.
    reason: Option<String>,
}

impl Keeper {
    /// Until the role is drained or killed. A process that ends before it was ever ready is an
    /// error, since the next one would fare no better.
    pub(super) async fn run(mut self) -> Result<(), KeepError> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut ever_ready = false;
        loop {
            let end = self.run_once().await?;
            if self.stop.drain.is_cancelled() || self.stop.kill.is_cancelled() {
                return Ok(());
            }
            self.tell(What::Gone).await;
            ever_ready |= end.was_ready;
            let reason = end.reason.unwrap_or_else(|| end.status.to_string());
            if !ever_ready {
                return Err(KeepError::Start {
                    name: self.launch.name,
                    reason,
                });
            }
            if end.was_ready {
                backoff.reset();
            }
            let pause = backoff.pause();
            tracing::warn!(process = %self.launch.name, %reason, ?pause, "ended; starting it again");
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stop.drain.cancelled() => return Ok(()),
                () = self.stop.kill.cancelled() => return Ok(()),
            }
        }
    }

    /// One process, from its start to its end.
    async fn run_once(&mut self) -> Result<End, KeepError> {
        let mut child = Child::spawn(&self.launch).map_err(|source| KeepError::Spawn {
            name: self.launch.name.clone(),
            source,
        })?;
        if let Some(workers) = &mut self.workers {
            workers.mark_changed();
        }
        let mut end_by: Option<Instant> = None;
        let mut killed = false;
        let (mut was_ready, mut reason) = (false, None);
        loop {
            tokio::select! {
                next = child.next() => match next.map_err(|source| KeepError::Wait {
                    name: self.launch.name.clone(),
                    source,
                })? {
                    Next::Reported(Report::Listening(address)) => {
                        self.tell(What::Listening(address)).await;
                    }
                    Next::Reported(Report::Ready) => {
                        was_ready = true;
                        self.tell(What::Ready).await;
                    }
                    Next::Reported(Report::Failed(text)) => reason = Some(text),
                    Next::Ended(status) => return Ok(End { status, was_ready, reason }),
                },
                members = changed(&mut self.workers) => {
                    child.order(&Order::Workers(members)).await;
                }
                () = self.stop.drain.cancelled(), if end_by.is_none() => {
                    child.order(&Order::Drain).await;
                    end_by = Some(Instant::now() + self.stop.patience);
                }
                () = at(end_by), if !killed => {
                    tracing::warn!(process = %self.launch.name, "did not end in time; killed");
                    killed = true;
                    child.kill();
                }
                () = self.stop.kill.cancelled(), if !killed => {
                    killed = true;
                    child.kill();
                }
            }
        }
    }

    async fn tell(&self, what: What) {
        // The receiver is gone only where the supervisor is ending.
        let slot = self.slot;
        let _ = self.events.send(Event { slot, what }).await;
    }
}

/// The next list of workers; never where there is none to come.
async fn changed(workers: &mut Option<watch::Receiver<Vec<Member>>>) -> Vec<Member> {
    if let Some(workers) = workers
        && workers.changed().await.is_ok()
    {
        return workers.borrow_and_update().clone();
    }
    std::future::pending().await
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
