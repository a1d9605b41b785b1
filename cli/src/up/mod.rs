//! `shoal up`: a whole cluster on this machine, as processes under one supervisor.

mod banner;
mod child;
mod control;
mod keeper;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use shoal_core::Class;
use shoal_fabric::membership::{Member, Role};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use child::Launch;
pub(crate) use control::{Control, Report};
use keeper::{Event, KeepError, Keeper, Stop, What};

/// Slot of the router; workers follow.
const ROUTER: usize = 0;

/// Events that may wait for the supervisor.
const EVENTS: usize = 64;

/// Why a cluster could not be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpError {
    #[error("the path of this program is unknown")]
    Program(#[source] io::Error),
    #[error("signals cannot be caught")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Keep(#[from] KeepError),
    #[error("a supervising task failed")]
    Task(#[from] tokio::task::JoinError),
}

impl UpError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        Class::Fatal
    }
}

/// A validated cluster of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UpConfig {
    /// Worker processes.
    pub(crate) replicas: usize,
    /// How long the router may take to end in order, more than its own drain; then it is killed.
    pub(crate) router_patience: Duration,
    /// The same for each worker.
    pub(crate) worker_patience: Duration,
    /// Arguments of the router's process, its role included.
    pub(crate) router: Vec<String>,
    /// Arguments of each worker's process, its role included.
    pub(crate) worker: Vec<String>,
    /// Names of processes in front of their log lines.
    pub(crate) prefixed: bool,
    /// For the banner.
    pub(crate) model: PathBuf,
    /// For the banner.
    pub(crate) tls: bool,
}

/// Runs the cluster until a signal ends it.
pub(crate) async fn run(config: UpConfig, started: Instant) -> Result<(), UpError> {
    let mut signals = Signals::install().map_err(UpError::Signals)?;
    let program = std::env::current_exe().map_err(UpError::Program)?;
    let mut cluster = Cluster::start(&config, program);
    let result = cluster.serve(&config, &mut signals, started).await;
    if let Ok(()) = &result {
        tracing::info!("draining; a second signal kills");
    }
    let drained = tokio::select! {
        drained = cluster.drain() => drained,
        () = signals.next() => {
            cluster.kill.cancel();
            cluster.drain().await
        }
    };
    result.and(drained)
}

fn worker_name(config: &UpConfig, index: usize) -> String {
    match config.replicas {
        1 => "worker".to_owned(),
        _ => format!("worker-{index}"),
    }
}

/// A worker as the router is told of it.
fn member(config: &UpConfig, index: usize, address: SocketAddr) -> Option<Member> {
    let address = address.try_into().ok()?;
    Some(Member::new(
        Role::Worker,
        worker_name(config, index),
        address,
    ))
}

/// The processes, by role.
struct Cluster {
    router: JoinSet<Result<(), KeepError>>,
    workers: JoinSet<Result<(), KeepError>>,
    drain_router: CancellationToken,
    drain_workers: CancellationToken,
    kill: CancellationToken,
    events: mpsc::Receiver<Event>,
    members: watch::Sender<Vec<Member>>,
}

impl Cluster {
    /// Starts all processes at once: a router can wait for its workers.
    fn start(config: &UpConfig, program: PathBuf) -> Self {
        let (events_in, events) = mpsc::channel(EVENTS);
        let (members, workers) = watch::channel(Vec::new());
        let mut cluster = Self {
            router: JoinSet::new(),
            workers: JoinSet::new(),
            drain_router: CancellationToken::new(),
            drain_workers: CancellationToken::new(),
            kill: CancellationToken::new(),
            events,
            members,
        };
        let keeper = |slot,
                      name: String,
                      arguments: &[String],
                      workers,
                      drain: &CancellationToken,
                      patience| Keeper {
            slot,
            launch: Launch {
                name,
                program: program.clone(),
                arguments: arguments.to_vec(),
                prefixed: config.prefixed,
            },
            events: events_in.clone(),
            workers,
            stop: Stop {
                drain: drain.clone(),
                kill: cluster.kill.clone(),
                patience,
            },
        };
        for index in 0..config.replicas {
            let name = worker_name(config, index);
            let slot = ROUTER + 1 + index;
            let drain = &cluster.drain_workers;
            let patience = config.worker_patience;
            let worker = keeper(slot, name, &config.worker, None, drain, patience);
            cluster.workers.spawn(worker.run());
        }
        let (name, drain) = ("router".to_owned(), &cluster.drain_router);
        let patience = config.router_patience;
        let router = keeper(ROUTER, name, &config.router, Some(workers), drain, patience);
        cluster.router.spawn(router.run());
        cluster
    }

    /// Until a signal comes, or a role cannot be kept alive.
    async fn serve(
        &mut self,
        config: &UpConfig,
        signals: &mut Signals,
        started: Instant,
    ) -> Result<(), UpError> {
        let mut workers = vec![None; config.replicas];
        let mut front = None;
        let mut announced = false;
        loop {
            tokio::select! {
                () = signals.next() => return Ok(()),
                Some(result) = self.router.join_next() => result??,
                Some(result) = self.workers.join_next() => result??,
                Some(Event { slot, what }) = self.events.recv() => match (slot, what) {
                    (ROUTER, What::Listening(address)) => front = Some(address),
                    (ROUTER, What::Ready) => {
                        if let Some(address) = front.filter(|_| !announced) {
                            announced = true;
                            banner::print(config, address, started.elapsed());
                        }
                    }
                    (ROUTER, What::Gone) | (_, What::Ready) => {}
                    (worker, what) => {
                        let index = worker - ROUTER - 1;
                        workers[index] = match what {
                            What::Listening(address) => member(config, index, address),
                            _ => None,
                        };
                        self.members.send_replace(workers.iter().flatten().cloned().collect());
                    }
                },
            }
        }
    }

    /// Ends the router, which finishes its requests, then the workers. Cancel-safe.
    async fn drain(&mut self) -> Result<(), UpError> {
        self.events.close();
        self.drain_router.cancel();
        while let Some(result) = self.router.join_next().await {
            result??;
        }
        self.drain_workers.cancel();
        while let Some(result) = self.workers.join_next().await {
            result??;
        }
        Ok(())
    }
}

/// The signals that end a cluster.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn install() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
