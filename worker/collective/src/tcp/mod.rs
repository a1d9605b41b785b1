//! A group over TCP: a connection between every two ranks.
//!
//! A call sends each peer one frame, which has all rows and the group's epoch and the call's
//! number before them. A rank writes and reads all its connections by turns, so no two wait for
//! each other's buffers: it looks at them without waiting for a while, then sleeps until one is
//! ready. The end of a connection is the loss of its rank at once; a rank that is silent is lost
//! when patience is.

mod door;
mod frame;
mod hello;
mod link;
mod payload;
mod seat;
#[cfg(test)]
mod tests;

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use door::{Door, Visitors};
pub use hello::{Hello, HelloError, Purpose, Refusal, Secret, SecretError, dial, instance};
pub use payload::Payload;
pub use seat::{Lobby, Seat};

use crate::{Collective, CollectiveError, MAX_RANKS, Parts};
use frame::{Content, Header};
use link::{Expected, Link};

/// How long a rank looks at its connections before it sleeps: the way through a switch and back.
const SPIN: Duration = Duration::from_micros(50);

/// A rank's seat in a group over TCP.
pub struct Mesh {
    rank: usize,
    epoch: u64,
    payload: Payload,
    /// Most words of a frame.
    max: usize,
    patience: Duration,
    /// By rank; `None` for this one.
    links: Vec<Option<Link>>,
    /// The call to come.
    number: u32,
    /// Its frame.
    outbox: Vec<u8>,
    /// By rank: the parts of a call. Longer than those, not to be filled with zeros each time.
    parts: Vec<Vec<f32>>,
    /// Of this rank's part.
    len: usize,
}

/// What makes a group what it is, beside its ranks.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The formation.
    pub epoch: u64,
    /// What parts are rounded to.
    pub payload: Payload,
    /// Most words of a frame.
    pub words: usize,
    /// How long a rank is waited for before it counts as hung.
    pub patience: Duration,
}

impl Mesh {
    /// The seat of the rank that has a connection to every other, in its place, and none in its
    /// own.
    ///
    /// # Errors
    /// When the system refuses.
    ///
    /// # Panics
    /// When there are more than [`MAX_RANKS`], or not one place is empty.
    pub fn new(streams: Vec<Option<TcpStream>>, terms: Terms) -> io::Result<Self> {
        let world = streams.len();
        let mut own = streams.iter().enumerate().filter(|(_, s)| s.is_none());
        let rank = match (own.next(), own.next()) {
            (Some((rank, _)), None) if world <= MAX_RANKS => rank,
            _ => panic!("{world} ranks, each but one with a connection"),
        };
        let links = streams.into_iter().enumerate().map(|(rank, stream)| {
            let link = stream.map(|stream| Link::new(rank, stream));
            link.transpose()
        });
        Ok(Self {
            rank,
            epoch: terms.epoch,
            payload: terms.payload,
            max: terms.words,
            patience: terms.patience,
            links: links.collect::<io::Result<_>>()?,
            number: 1,
            outbox: Vec::new(),
            parts: vec![Vec::new(); world],
            len: 0,
        })
    }

    fn fits(&self, words: usize) -> Result<(), CollectiveError> {
        let max = self.max;
        match words <= max {
            true => Ok(()),
            false => Err(CollectiveError::TooLarge { words, max }),
        }
    }

    /// Begins the frame of the call.
    fn head(&mut self, content: Content, len: usize) {
        self.outbox.clear();
        let header = Header {
            epoch: self.epoch,
            number: self.number,
            len: len as u32,
            content,
        };
        header.encode(&mut self.outbox);
    }

    /// Sends the frame to the ranks that are `to`, and waits for one of the same content of those
    /// that are `from`. An error is this rank's end in the group.
    fn call(
        &mut self,
        content: Content,
        to: impl Fn(usize) -> bool,
        from: impl Fn(usize) -> bool,
        patience: Option<Duration>,
    ) -> Result<(), CollectiveError> {
        for (rank, link) in self.links.iter_mut().enumerate() {
            if let Some(link) = link {
                link.unsent = if to(rank) { self.outbox.len() } else { 0 };
                link.due = from(rank);
            }
        }
        let result = self.turn(content, patience);
        if let Err(error) = &result {
            self.leave(error.blamed().unwrap_or(self.rank));
        }
        self.number = self.number.wrapping_add(1);
        result
    }

    fn turn(
        &mut self,
        content: Content,
        patience: Option<Duration>,
    ) -> Result<(), CollectiveError> {
        let expected = Expected {
            epoch: self.epoch,
            number: self.number,
            content,
            max: self.max,
        };
        let started = Instant::now();
        loop {
            let mut open = None;
            for (rank, link) in self.links.iter_mut().enumerate() {
                let Some(link) = link else { continue };
                link.push(&self.outbox)?;
                link.pull(expected)?;
                if open.is_none() && !link.is_done() {
                    open = Some(rank);
                }
            }
            let Some(rank) = open else { return Ok(()) };
            let waited = started.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
                continue;
            }
            match patience {
                Some(after) if waited >= after => {
                    return Err(CollectiveError::Timeout { rank, after });
                }
                _ => self.sleep(patience.map(|patience| patience - waited))?,
            }
        }
    }

    /// Sleeps until a connection can go on, or has ended.
    fn sleep(&mut self, limit: Option<Duration>) -> Result<(), CollectiveError> {
        let mut fds = Vec::with_capacity(MAX_RANKS);
        for link in self.links.iter().flatten() {
            let mut flags = PollFlags::RDHUP;
            flags.set(PollFlags::IN, link.due);
            flags.set(PollFlags::OUT, link.unsent > 0);
            fds.push(PollFd::from_borrowed_fd(link.fd(), flags));
        }
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(&mut fds, limit.as_ref()) {
            // The caller looks again in any case.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let ended = fds.iter().map(|fd| fd.revents().intersects(ended));
        let ended: Vec<bool> = ended.collect();
        for (link, ended) in self.links.iter_mut().flatten().zip(ended) {
            // A frame that is due may still be before the end.
            if ended && !link.due {
                return Err(link.lost());
            }
        }
        Ok(())
    }

    /// Takes the parts that have come; their lengths by rank.
    fn take_parts(&mut self, payload: Payload) -> [usize; MAX_RANKS] {
        let mut lens = [0; MAX_RANKS];
        for (rank, link) in self.links.iter_mut().enumerate() {
            let Some(link) = link else {
                lens[rank] = self.len;
                continue;
            };
            let (len, bytes) = link.take();
            lens[rank] = len;
            payload.decode(bytes, room(&mut self.parts[rank], len));
        }
        self.len = 0;
        lens
    }

    fn parts(&self, lens: [usize; MAX_RANKS]) -> Parts<'_> {
        Parts::new(self.parts.len(), |rank| &self.parts[rank][..lens[rank]])
    }

    fn leave(&mut self, blamed: usize) {
        for link in self.links.iter_mut().flatten() {
            link.leave(self.epoch, blamed);
        }
    }
}

/// The first `len` numbers, of any value.
fn room(numbers: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if numbers.len() < len {
        numbers.resize(len, 0.0);
    }
    &mut numbers[..len]
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.links.len()
    }

    fn broadcast(&mut self, words: &mut Vec<u32>) -> Result<(), CollectiveError> {
        let content = Content::Words;
        if self.rank == 0 {
            self.fits(words.len())?;
            self.head(content, words.len());
            let bytes = words.iter().flat_map(|word| word.to_le_bytes());
            self.outbox.extend(bytes);
            return self.call(content, |_| true, |_| false, Some(self.patience));
        }
        self.call(content, |_| false, |rank| rank == 0, None)?;
        words.clear();
        if let Some(link) = &mut self.links[0] {
            let (_, bytes) = link.take();
            words.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|word| u32::from_le_bytes(*word)),
            );
        }
        Ok(())
    }

    fn part(&mut self, len: usize) -> Result<&mut [f32], CollectiveError> {
        self.fits(len)?;
        self.len = len;
        Ok(room(&mut self.parts[self.rank], len))
    }

    fn exchange(&mut self) -> Result<Parts<'_>, CollectiveError> {
        let (payload, expected) = (self.payload, self.len);
        let content = Content::Part(payload);
        self.head(content, expected);
        payload.encode(&mut self.parts[self.rank][..expected], &mut self.outbox);
        self.call(content, |_| true, |_| true, Some(self.patience))?;
        let lens = self.take_parts(payload);
        for (rank, &got) in lens[..self.links.len()].iter().enumerate() {
            if got != expected {
                return Err(CollectiveError::Mismatch {
                    rank,
                    got,
                    expected,
                });
            }
        }
        Ok(self.parts(lens))
    }

    fn gather(&mut self) -> Result<Option<Parts<'_>>, CollectiveError> {
        // What is chosen from is not rounded.
        let (payload, content) = (Payload::F32, Content::Piece);
        if self.rank == 0 {
            self.call(content, |_| false, |_| true, Some(self.patience))?;
            let lens = self.take_parts(payload);
            return Ok(Some(self.parts(lens)));
        }
        self.head(content, self.len);
        payload.encode(&mut self.parts[self.rank][..self.len], &mut self.outbox);
        self.len = 0;
        self.call(content, |rank| rank == 0, |_| false, Some(self.patience))?;
        Ok(None)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.leave(self.rank);
    }
}
