//! The life of a rank on a machine of its own: it comes to rank 0, loads the part that it is told,
//! and follows; it comes again whenever its line has ended, with the weights that it has.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use shoal_collective::tcp::{
    Door, Hello, HelloError, Lobby, Purpose, Refusal, Seat, Secret, Terms, Visitors, dial, instance,
};
use shoal_collective::{CollectiveError, Pace};
use shoal_core::Class;
use shoal_engine::backend::{Backend, BackendError};
use shoal_engine::cpu::CpuBackend;
use shoal_fabric::backoff::Backoff;
use shoal_fabric::shutdown::Shutdown;
use shoal_kernels::Isa;
use tokio::sync::oneshot;

use super::line::{Order, receive, send};
use super::status::Status;
use crate::config::{RankConfig, isa_name, parse_payload};
use crate::error::WorkerError;
use crate::group::GroupError;
use crate::group::line::{Part, Report};
use crate::load;

/// What coming to a rank may take.
const DIAL: Duration = Duration::from_secs(5);
/// Between attempts to come to rank 0.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Runs a rank of a worker elsewhere, until the shutdown starts or rank 0 has no use for it.
///
/// # Errors
/// When rank 0 refuses it, its part cannot be loaded, or it is another than that of rank 0.
pub async fn join_group(config: RankConfig, shutdown: Shutdown) -> Result<(), WorkerError> {
    config.validate()?;
    let status = Status::new();
    let port = match &config.probes {
        Some(listen) => Some(status.serve(listen, &shutdown).await?),
        None => None,
    };
    let result = on_own_thread(config, status, &shutdown).await;
    if let Some(port) = port {
        port.close().await;
    }
    result
}

async fn on_own_thread(
    config: RankConfig,
    status: Status,
    shutdown: &Shutdown,
) -> Result<(), WorkerError> {
    let (done, result) = oneshot::channel();
    let work = || Rank::start(config, status).and_then(Rank::run);
    std::thread::Builder::new()
        .name("rank".into())
        // Nobody listens any more where the shutdown came first.
        .spawn(move || drop(done.send(work())))
        .map_err(WorkerError::LoadThread)?;
    match shutdown.token().run_until_cancelled(result).await {
        // The end of the process ends its connections, and rank 0 sees that.
        None => Ok(()),
        Some(result) => result.map_err(|_| WorkerError::LoadBroken)?,
    }
}

/// Where the ranks above this one come to meet it.
struct Hall {
    lobby: Lobby,
    rank: usize,
    world: usize,
}

impl Visitors for Hall {
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        match hello.purpose {
            Purpose::Join => Err(Refusal::Purpose),
            Purpose::Meet => self.lobby.admit(hello, self.rank, self.world),
        }
    }

    fn enter(&self, hello: Hello, _: SocketAddr, stream: TcpStream) {
        self.lobby.enter(&hello, stream);
    }

    fn turned_away(&self, peer: SocketAddr, error: &HelloError) {
        tracing::warn!(%peer, error = error as &dyn std::error::Error, "a rank was turned away");
    }
}

/// See the [module](self).
struct Rank {
    config: RankConfig,
    status: Status,
    secret: Arc<Secret>,
    hall: Arc<Hall>,
    /// The last rank needs none.
    door: Option<Door>,
    instance: u64,
    /// The latest formation that it was called to.
    epoch: u64,
    /// What it has loaded.
    loaded: Option<(Part, CpuBackend)>,
}

impl Rank {
    fn start(config: RankConfig, status: Status) -> Result<Self, WorkerError> {
        let secret = Arc::new(Secret::read(&config.secret).map_err(GroupError::from)?);
        let hall = Arc::new(Hall {
            lobby: Lobby::default(),
            rank: config.rank,
            world: config.world,
        });
        let address = config.listen;
        let open = || Door::open(address, Arc::clone(&secret), Arc::clone(&hall) as _);
        let door = (config.rank + 1 < config.world).then(open).transpose();
        Ok(Self {
            door: door.map_err(|source| GroupError::Listen { address, source })?,
            secret,
            hall,
            instance: instance().map_err(GroupError::Line)?,
            config,
            status,
            epoch: 0,
            loaded: None,
        })
    }

    /// Comes to rank 0, again and again.
    fn run(mut self) -> Result<(), WorkerError> {
        let hello = Hello {
            purpose: Purpose::Join,
            rank: self.config.rank,
            world: self.config.world,
            port: self.door.as_ref().map_or(0, |door| door.address().port()),
            epoch: 0,
            instance: self.instance,
        };
        let (host, port) = (self.config.join.host(), self.config.join.port());
        let (host, mut pauses) = (host.to_owned(), Backoff::new(FIRST_PAUSE, LONGEST_PAUSE));
        let mut told = false;
        loop {
            let hello = Hello {
                epoch: self.epoch,
                ..hello
            };
            match dial((host.as_str(), port), &hello, &self.secret, DIAL) {
                Ok(line) => {
                    tracing::info!(rank_0 = %self.config.join, "rank 0 is there");
                    told = false;
                    pauses.reset();
                    match self.obey(&line)? {
                        Ok(()) => tracing::warn!("rank 0 has left"),
                        Err(error) => tracing::warn!(%error, "the line to rank 0 has broken"),
                    }
                }
                Err(error) if error.class() == Class::Retry => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            rank_0 = %self.config.join,
                            "rank 0 cannot be reached; it is tried again"
                        );
                    }
                }
                Err(source) => return Err(GroupError::Join { source }.into()),
            }
            std::thread::sleep(pauses.pause());
        }
    }

    /// Does what rank 0 says until the line ends; whether that was as it should.
    fn obey(&mut self, line: &TcpStream) -> Result<io::Result<()>, WorkerError> {
        loop {
            let order = match receive(line) {
                Ok(Some(order)) => order,
                ended => return Ok(ended.map(|_| ())),
            };
            match order {
                Order::Load(part) => {
                    if let Err(broken) = self.load(part, line)? {
                        return Ok(Err(broken));
                    }
                }
                Order::Meet {
                    epoch,
                    patience_ms,
                    words,
                    below,
                } => {
                    let patience = Duration::from_millis(patience_ms);
                    self.meet(line, epoch, patience, words, below)?;
                }
                Order::Differs => {
                    let rank = self.config.rank;
                    return Err(GroupError::Different { rank }.into());
                }
            }
        }
    }

    /// Loads a part, or keeps what is one but for its pages; whether rank 0 could be told.
    fn load(&mut self, part: Part, line: &TcpStream) -> Result<io::Result<()>, WorkerError> {
        let isa = self.config.isa.unwrap_or_else(Isa::detect);
        let part = Part {
            model: self.config.model.clone(),
            isa: isa_name(isa).to_owned(),
            threads: self.config.threads(),
            ..part
        };
        let result = match self.loaded.take() {
            Some((kept, mut backend))
                if kept
                    == (Part {
                        pages: kept.pages,
                        ..part.clone()
                    }) =>
            {
                tracing::info!(rank = part.rank, "the weights are here already");
                let resized = match kept.pages == part.pages {
                    true => Ok(()),
                    false => backend.set_pages(part.pages),
                };
                resized.map(|()| backend).map_err(load::LoadError::from)
            }
            // What there was is given up first: there may be no memory for two.
            _ => load::rank(&part),
        };
        match result {
            Ok(backend) => {
                let numerics_id = backend.numerics_id().0;
                self.loaded = Some((part, backend));
                Ok(send(line, &Report::Loaded { numerics_id }))
            }
            Err(source) => {
                let message = source.to_string();
                // It ends in any case.
                let _ = send(line, &Report::Failed { message });
                let path = part.model;
                Err(WorkerError::Load { path, source })
            }
        }
    }

    /// Meets the others, and follows rank 0 until the group breaks.
    fn meet(
        &mut self,
        line: &TcpStream,
        epoch: u64,
        patience: Duration,
        words: usize,
        below: Vec<SocketAddr>,
    ) -> Result<(), WorkerError> {
        let Some((part, backend)) = &mut self.loaded else {
            return Err(GroupError::Order.into());
        };
        self.epoch = epoch;
        let payload = parse_payload(&part.payload)?;
        // Rank 0 is where its line comes from.
        let first = line.peer_addr().map_err(GroupError::Line)?;
        let below: Vec<SocketAddr> = std::iter::once(first).chain(below).collect();
        let seat = Seat {
            rank: part.rank,
            below: &below,
            world: part.world,
            lobby: &self.hall.lobby,
            secret: &self.secret,
            instance: self.instance,
        };
        let terms = Terms {
            epoch,
            payload,
            words,
            patience,
        };
        let ended = take_part(backend, &seat, terms, &self.status);
        backend.leave();
        match ended {
            // Rank 0 calls for another meeting, or the line ends.
            Err(BackendError::Group(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, epoch, "the group has ended");
                Ok(())
            }
            Err(error) => Err(GroupError::Step(error).into()),
            Ok(()) => Ok(()),
        }
    }
}

/// Steps until the group breaks.
fn take_part(
    backend: &mut CpuBackend,
    seat: &Seat<'_>,
    terms: Terms,
    status: &Status,
) -> Result<(), BackendError> {
    if seat.below.len() != seat.rank {
        let rank = seat.below.len();
        return Err(CollectiveError::PeerLost { rank }.into());
    }
    let mut mesh = seat.take(terms)?;
    Pace::measure(&mut mesh, terms.words)?;
    backend.join(Box::new(mesh))?;
    tracing::info!(epoch = terms.epoch, "the group is whole");
    let _whole = status.whole();
    loop {
        backend.follow()?;
        status.steps.inc();
    }
}
