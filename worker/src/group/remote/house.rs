//! Where ranks elsewhere come to rank 0, and the lines to those that have come.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shoal_collective::tcp::{Hello, HelloError, Lobby, Purpose, Refusal, Visitors};

use super::line::{Order, receive, send};
use crate::group::line::{Part, Report};
use crate::group::{GroupError, Watch};

/// What a rank's machine may take to read an order: it computes, but one fits its buffers.
const WRITE: Duration = Duration::from_secs(1);

/// A rank that has come.
struct Line {
    stream: Arc<TcpStream>,
    /// Of its process.
    instance: u64,
    /// Where it waits for the ranks above it.
    address: SocketAddr,
    /// What it said of its part, once it did.
    numerics_id: Option<[u8; 32]>,
    /// The latest formation that it knows.
    epoch: u64,
    /// It was called to the meeting that holds.
    met: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        // Ends its thread, which listens. It may be gone already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// See the [module](self).
pub(super) struct House {
    /// Of rank 0.
    part: Part,
    /// Where ranks wait for a meeting.
    pub(super) lobby: Lobby,
    /// By rank, from 1.
    lines: Mutex<Vec<Option<Line>>>,
    /// A rank has come, has loaded, or has left.
    news: Condvar,
    watch: Arc<Watch>,
}

impl House {
    pub(super) fn new(part: Part, watch: Arc<Watch>) -> Self {
        Self {
            lobby: Lobby::default(),
            lines: Mutex::new((1..part.world).map(|_| None).collect()),
            part,
            news: Condvar::new(),
            watch,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranks that are not here with their parts loaded, after a wait for news if there are
    /// any. One whose part is not that of this numerics id is sent away.
    pub(super) fn missing(&self, numerics_id: [u8; 32], wait: Duration) -> Vec<usize> {
        let missing = |lines: &mut Vec<Option<Line>>| {
            let mut missing = Vec::new();
            for (line, rank) in lines.iter_mut().zip(1..) {
                let differs =
                    |line: &mut Line| line.numerics_id.is_some_and(|id| id != numerics_id);
                if let Some(line) = line.take_if(differs) {
                    let error = GroupError::Different { rank };
                    tracing::error!(address = %line.address, "{error}");
                    // It ends in any case.
                    let _ = send(&line.stream, &Order::Differs);
                }
                if line.as_ref().is_none_or(|line| line.numerics_id.is_none()) {
                    missing.push(rank);
                }
            }
            missing
        };
        let mut lines = self.lock();
        let before = missing(&mut lines);
        if before.is_empty() {
            return before;
        }
        let woken = self.news.wait_timeout(lines, wait);
        missing(&mut woken.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Calls every rank to a meeting; `order` makes the order of the addresses of the ranks below
    /// it. Their addresses.
    pub(super) fn call(&self, order: impl Fn(Vec<SocketAddr>) -> Order) -> Vec<SocketAddr> {
        let mut lines = self.lock();
        let mut addresses = Vec::new();
        for line in lines.iter_mut() {
            let below = addresses.clone();
            addresses.extend(line.as_ref().map(|line| line.address));
            let deaf = line.take_if(|line| {
                line.met = true;
                send(&line.stream, &order(below.clone())).is_err()
            });
            if let Some(line) = deaf {
                tracing::warn!(address = %line.address, "a rank takes no orders");
            }
        }
        addresses
    }

    /// The latest formation that any rank knows: an earlier rank 0 may have had another clock.
    pub(super) fn epoch(&self) -> u64 {
        let lines = self.lock();
        let epochs = lines.iter().flatten().map(|line| line.epoch);
        epochs.max().unwrap_or(0)
    }

    /// The first rank that was at the last meeting and is no longer here.
    pub(super) fn gone(&self) -> Option<usize> {
        let lines = self.lock();
        let gone = |line: &Option<Line>| line.as_ref().is_none_or(|line| !line.met);
        lines.iter().position(gone).map(|index| index + 1)
    }

    /// Ends the line to a rank; it may come again.
    pub(super) fn end(&self, rank: usize) {
        if let Some(line) = rank
            .checked_sub(1)
            .and_then(|i| self.lock().get_mut(i)?.take())
        {
            tracing::info!(rank, address = %line.address, "the line to a rank is given up");
        }
    }

    /// Tells a rank its part, and hears what it says until its line ends.
    fn listen(&self, stream: &Arc<TcpStream>, rank: usize) -> io::Result<()> {
        let part = Part {
            rank,
            ..self.part.clone()
        };
        send(stream, &Order::Load(part))?;
        while let Some(report) = receive(stream)? {
            match report {
                Report::Loaded { numerics_id } => {
                    if let Some(line) = &mut self.lock()[rank - 1]
                        && Arc::ptr_eq(&line.stream, stream)
                    {
                        line.numerics_id = Some(numerics_id);
                    }
                    self.news.notify_all();
                }
                Report::Failed { message } => {
                    let error = GroupError::Load { rank, message };
                    tracing::error!("{error}");
                }
            }
        }
        Ok(())
    }
}

impl Visitors for House {
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        let world = self.part.world;
        if hello.purpose == Purpose::Meet {
            return self.lobby.admit(hello, 0, world);
        }
        if hello.world != world {
            return Err(Refusal::World { ours: world });
        }
        let index = hello.rank.checked_sub(1).ok_or(Refusal::Rank)?;
        match self.lock().get(index).ok_or(Refusal::Rank)? {
            // A process may come again before its old line is known to have ended.
            Some(line) if line.instance != hello.instance => Err(Refusal::Taken),
            _ => Ok(()),
        }
    }

    fn enter(&self, hello: Hello, peer: SocketAddr, stream: TcpStream) {
        let rank = hello.rank;
        if hello.purpose == Purpose::Meet {
            return self.lobby.enter(&hello, stream);
        }
        if let Err(error) = stream.set_write_timeout(Some(WRITE)) {
            tracing::warn!(%error, rank, "a line cannot be used");
            return;
        }
        tracing::info!(rank, %peer, "a rank has come");
        let stream = Arc::new(stream);
        // In place of an earlier one, which ends.
        self.lock()[rank - 1] = Some(Line {
            stream: Arc::clone(&stream),
            instance: hello.instance,
            address: SocketAddr::new(peer.ip(), hello.port),
            numerics_id: None,
            epoch: hello.epoch,
            met: false,
        });
        match self.listen(&stream, rank) {
            Ok(()) => tracing::warn!(rank, %peer, "a rank has left"),
            Err(error) => tracing::warn!(rank, %peer, %error, "the line to a rank has broken"),
        }
        self.lock()[rank - 1].take_if(|line| Arc::ptr_eq(&line.stream, &stream));
        self.news.notify_all();
        self.watch.deaths.send_modify(|deaths| *deaths += 1);
    }

    fn turned_away(&self, peer: SocketAddr, error: &HelloError) {
        tracing::warn!(%peer, error = error as &dyn std::error::Error, "a rank was turned away");
    }
}
