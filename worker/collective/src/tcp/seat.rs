//! How the ranks of a group come to be connected with one another.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::hello::{Hello, HelloError, Purpose, Refusal, Secret, dial};
use super::{Mesh, Terms};
use crate::{Collective, CollectiveError, MAX_RANKS};

/// Connections of the ranks above one, until it meets them.
#[derive(Default)]
pub struct Lobby {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// The latest formation that was met in.
    epoch: u64,
    /// By rank, with the formation that each wants.
    streams: [Option<(u64, TcpStream)>; MAX_RANKS],
}

impl Lobby {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a rank may wait here to meet rank `rank` of `world`.
    ///
    /// # Errors
    /// When it is of another group, or of a formation that is over.
    pub fn admit(&self, hello: &Hello, rank: usize, world: usize) -> Result<(), Refusal> {
        let ours = self.lock().epoch;
        match *hello {
            _ if hello.world != world => Err(Refusal::World { ours: world }),
            _ if !(rank + 1..world).contains(&hello.rank) => Err(Refusal::Rank),
            _ if hello.epoch < ours => Err(Refusal::Epoch { ours }),
            _ => Ok(()),
        }
    }

    /// A rank that was admitted waits, in place of an earlier connection of its.
    pub fn enter(&self, hello: &Hello, stream: TcpStream) {
        if let Some(place) = self.lock().streams.get_mut(hello.rank) {
            *place = Some((hello.epoch, stream));
        }
        self.came.notify_all();
    }

    /// From now on those of earlier formations are refused.
    pub fn expect(&self, epoch: u64) {
        let mut waiting = self.lock();
        waiting.epoch = waiting.epoch.max(epoch);
        for place in &mut waiting.streams {
            place.take_if(|(wanted, _)| *wanted < epoch);
        }
    }

    fn take(&self, rank: usize, epoch: u64, until: Instant) -> Option<TcpStream> {
        let mut waiting = self.lock();
        loop {
            let wanted = |(wanted, _): &mut (u64, TcpStream)| *wanted == epoch;
            if let Some((_, stream)) = waiting.streams.get_mut(rank)?.take_if(wanted) {
                return Some(stream);
            }
            let left = until.checked_duration_since(Instant::now())?;
            let woken = self.came.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A rank's way to its place in a group.
pub struct Seat<'a> {
    /// The rank.
    pub rank: usize,
    /// Where those below it are, by rank.
    pub below: &'a [SocketAddr],
    /// Ranks of the group.
    pub world: usize,
    /// Where those above it wait.
    pub lobby: &'a Lobby,
    /// The group's.
    pub secret: &'a Secret,
    /// This process, for those below.
    pub instance: u64,
}

impl Seat<'_> {
    /// Dials the ranks below, waits for those above, and until every rank has all others.
    ///
    /// # Errors
    /// When one does not come in time, or refuses.
    pub fn take(&self, terms: Terms) -> Result<Mesh, CollectiveError> {
        let Terms {
            epoch, patience, ..
        } = terms;
        self.lobby.expect(epoch);
        let until = Instant::now() + patience;
        let hello = Hello {
            purpose: Purpose::Meet,
            rank: self.rank,
            world: self.world,
            port: 0,
            epoch,
            instance: self.instance,
        };
        let mut streams = Vec::with_capacity(self.world);
        for (rank, address) in self.below.iter().enumerate() {
            let stream = dial(address, &hello, self.secret, patience);
            let stream = stream.map_err(|error| match error {
                HelloError::Refused(Refusal::Epoch { ours: theirs }) => {
                    let ours = epoch;
                    CollectiveError::StaleEpoch { ours, theirs }
                }
                source => CollectiveError::Unreachable { rank, source },
            })?;
            streams.push(Some(stream));
        }
        streams.push(None);
        for rank in self.rank + 1..self.world {
            let stream = self.lobby.take(rank, epoch, until);
            let after = patience;
            streams.push(Some(
                stream.ok_or(CollectiveError::Timeout { rank, after })?,
            ));
        }
        let mut mesh = Mesh::new(streams, terms)?;
        mesh.part(0)?;
        mesh.exchange()?;
        Ok(mesh)
    }
}

impl Mesh {
    /// A group of `world` threads of this process.
    ///
    /// # Errors
    /// When the system refuses the connections.
    pub fn threads(world: usize, terms: Terms) -> io::Result<impl Iterator<Item = Self>> {
        let mut streams: Vec<Vec<Option<TcpStream>>> = Vec::new();
        streams.resize_with(world, || (0..world).map(|_| None).collect());
        for above in 0..world {
            for below in 0..above {
                let listener = TcpListener::bind(("127.0.0.1", 0))?;
                let guest = TcpStream::connect(listener.local_addr()?)?;
                let (host, _) = listener.accept()?;
                for stream in [&guest, &host] {
                    stream.set_nodelay(true)?;
                }
                streams[above][below] = Some(guest);
                streams[below][above] = Some(host);
            }
        }
        let seats = streams.into_iter().map(|streams| Self::new(streams, terms));
        let seats: Vec<Self> = seats.collect::<io::Result<_>>()?;
        Ok(seats.into_iter())
    }
}
