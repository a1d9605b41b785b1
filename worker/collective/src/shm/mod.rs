//! A group in shared memory: the processes of a machine, or threads.
//!
//! A rank writes a frame to one of its two slots, by turns, and raises its number; the others
//! wait for the number and read the frame where it lies. A number says that all calls before
//! are done, so a slot is written again only when every rank has begun the call after the one
//! that used it: two loads in the steady state, and no further meeting.

mod segment;
#[cfg(test)]
mod tests;
mod wait;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub use segment::Segment;
use wait::{Peers, leave, publish};

use crate::{Collective, CollectiveError, Parts};

/// A rank's seat in a [`Segment`].
pub struct Ring {
    segment: Arc<Segment>,
    peers: Peers,
    rank: usize,
    epoch: u64,
    /// The call to come.
    number: u32,
    /// Words of its frame.
    len: usize,
    patience: Duration,
}

impl Ring {
    /// Takes the seat of `rank`, and waits for all ranks to take theirs. From then on a rank that
    /// is waited for longer than `patience` within a step counts as hung.
    ///
    /// # Errors
    /// When a rank does not come within `patience`, or the segment is of another epoch.
    ///
    /// # Panics
    /// When the segment has no such rank.
    pub fn join(
        segment: Arc<Segment>,
        rank: usize,
        epoch: u64,
        patience: Duration,
    ) -> Result<Self, CollectiveError> {
        let theirs = segment.epoch();
        if theirs != epoch {
            return Err(CollectiveError::StaleEpoch {
                ours: epoch,
                theirs,
            });
        }
        let header = segment.header(rank);
        header.epoch.store(epoch, Ordering::Relaxed);
        header.pid.store(std::process::id(), Ordering::Release);
        publish(header, 1);
        let alone = Peers::none(rank);
        for peer in 0..segment.world() {
            alone.wait(&segment, peer, 1, Some(patience))?;
        }
        Ok(Self {
            peers: Peers::new(&segment, rank)?,
            segment,
            rank,
            epoch,
            number: 2,
            len: 0,
            patience,
        })
    }

    /// A group of `world` threads of this process.
    ///
    /// # Errors
    /// When the system refuses the memory, or a rank does not come.
    pub fn threads(
        world: usize,
        words: usize,
        patience: Duration,
    ) -> io::Result<impl Iterator<Item = impl FnOnce() -> Result<Self, CollectiveError> + Send>>
    {
        let (segment, _) = Segment::create(world, 1, words)?;
        let segment = Arc::new(segment);
        Ok((0..world).map(move |rank| {
            let segment = Arc::clone(&segment);
            move || Self::join(segment, rank, 1, patience)
        }))
    }

    fn slot(&self) -> usize {
        self.number as usize % 2
    }

    /// Begins the call: this rank's frame is there.
    fn publish(&self) -> Result<(), CollectiveError> {
        // For the length; a frame has been waiting for this already.
        self.clear()?;
        let header = self.segment.header(self.rank);
        header.lens[self.slot()].store(self.len as u32, Ordering::Relaxed);
        publish(header, self.number);
        Ok(())
    }

    /// Ends the call.
    fn next(&mut self) {
        self.number = self.number.wrapping_add(1);
        self.len = 0;
    }

    /// Waits for the frame of a rank; its length.
    fn frame_of(&self, rank: usize, patience: Option<Duration>) -> Result<usize, CollectiveError> {
        self.peers
            .wait(&self.segment, rank, self.number, patience)?;
        let header = self.segment.header(rank);
        let theirs = header.epoch.load(Ordering::Relaxed);
        if theirs != self.epoch {
            let ours = self.epoch;
            return Err(CollectiveError::StaleEpoch { ours, theirs });
        }
        let len = header.lens[self.slot()].load(Ordering::Relaxed) as usize;
        self.fits(len)?;
        Ok(len)
    }

    fn fits(&self, words: usize) -> Result<(), CollectiveError> {
        let max = self.segment.words();
        match words <= max {
            true => Ok(()),
            false => Err(CollectiveError::TooLarge { words, max }),
        }
    }

    /// Waits until nobody reads what this rank said in the slot of the call to come.
    fn clear(&self) -> Result<(), CollectiveError> {
        let last = self.number.wrapping_sub(1);
        for peer in 0..self.segment.world() {
            self.peers
                .wait(&self.segment, peer, last, Some(self.patience))?;
        }
        Ok(())
    }

    /// What the ranks wrote for the call of which `slot` was, once all of it is there.
    fn parts(&self, slot: usize, lens: [usize; crate::MAX_RANKS]) -> Parts<'_> {
        // SAFETY: every rank has published its frame, and none writes to that slot before this
        // rank begins its next call, which needs `&mut self` and so the end of the parts.
        Parts::new(self.segment.world(), |rank| unsafe {
            self.segment.floats(rank, slot, lens[rank])
        })
    }

    /// Waits for the frames of all ranks; their lengths.
    fn all(&self) -> Result<[usize; crate::MAX_RANKS], CollectiveError> {
        let mut lens = [0; crate::MAX_RANKS];
        for (rank, len) in lens[..self.segment.world()].iter_mut().enumerate() {
            *len = self.frame_of(rank, Some(self.patience))?;
        }
        Ok(lens)
    }
}

impl Collective for Ring {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.segment.world()
    }

    fn broadcast(&mut self, words: &mut Vec<u32>) -> Result<(), CollectiveError> {
        if self.rank == 0 {
            self.fits(words.len())?;
            self.clear()?;
            self.len = words.len();
            // SAFETY: the slot is clear, and published after this.
            unsafe { self.segment.write(0, self.slot(), words) };
            self.publish()?;
        } else {
            self.publish()?;
            let len = self.frame_of(0, None)?;
            words.clear();
            // SAFETY: rank 0 has published the frame, and does not write to its slot before this
            // rank begins its next call.
            words.extend_from_slice(unsafe { self.segment.frame(0, self.slot(), len) });
        }
        self.next();
        Ok(())
    }

    fn part(&mut self, len: usize) -> Result<&mut [f32], CollectiveError> {
        self.fits(len)?;
        self.clear()?;
        self.len = len;
        // SAFETY: the slot is clear; this rank publishes it in its next call, which needs
        // `&mut self` and so the end of this borrow.
        Ok(unsafe { self.segment.floats_mut(self.rank, self.slot(), len) })
    }

    fn exchange(&mut self) -> Result<Parts<'_>, CollectiveError> {
        self.publish()?;
        let lens = self.all()?;
        let expected = self.len;
        for (rank, &got) in lens[..self.world()].iter().enumerate() {
            if got != expected {
                return Err(CollectiveError::Mismatch {
                    rank,
                    got,
                    expected,
                });
            }
        }
        let slot = self.slot();
        self.next();
        Ok(self.parts(slot, lens))
    }

    fn gather(&mut self) -> Result<Option<Parts<'_>>, CollectiveError> {
        self.publish()?;
        let lens = match self.rank {
            0 => Some(self.all()?),
            _ => None,
        };
        let slot = self.slot();
        self.next();
        Ok(lens.map(|lens| self.parts(slot, lens)))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        leave(self.segment.header(self.rank), self.rank);
    }
}
