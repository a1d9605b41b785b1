//! The one trait, and what an exchange gives.

use std::ops::Deref;

use crate::CollectiveError;

/// Most ranks of a group.
pub const MAX_RANKS: usize = 16;

/// A rank's seat in a group. All ranks call the same methods in the same order.
///
/// Every frame carries the group's epoch and a number that rises by one with every call. An
/// error ends the group for all.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn world(&self) -> usize;

    /// Rank 0 sends `words`; the others wait for them, for as long as the group lives, and get
    /// them in `words`.
    ///
    /// # Errors
    /// When a rank is lost or words do not fit.
    fn broadcast(&mut self, words: &mut Vec<u32>) -> Result<(), CollectiveError>;

    /// Room for this rank's part of the next [`exchange`](Self::exchange) or
    /// [`gather`](Self::gather), `len` floats of any value.
    ///
    /// # Errors
    /// When it does not fit, or a rank that still reads the room is lost.
    fn part(&mut self, len: usize) -> Result<&mut [f32], CollectiveError>;

    /// Gives this rank's part to every rank and waits for theirs, all of one length. Every rank
    /// sees the same bits.
    ///
    /// # Errors
    /// When a rank is lost, late, or has another length.
    fn exchange(&mut self) -> Result<Parts<'_>, CollectiveError>;

    /// Gives this rank's part to rank 0, which waits for all of them. The others get `None` at
    /// once.
    ///
    /// # Errors
    /// As `exchange`, but lengths may differ.
    fn gather(&mut self) -> Result<Option<Parts<'_>>, CollectiveError>;
}

/// The parts of all ranks, in their order.
pub struct Parts<'a> {
    parts: [&'a [f32]; MAX_RANKS],
    world: usize,
}

impl<'a> Parts<'a> {
    /// Of `world` ranks, at most [`MAX_RANKS`].
    pub(crate) fn new(world: usize, part: impl Fn(usize) -> &'a [f32]) -> Self {
        let mut parts: [&[f32]; MAX_RANKS] = [&[]; MAX_RANKS];
        for (rank, slot) in parts[..world].iter_mut().enumerate() {
            *slot = part(rank);
        }
        Self { parts, world }
    }
}

impl<'a> Deref for Parts<'a> {
    type Target = [&'a [f32]];

    fn deref(&self) -> &Self::Target {
        &self.parts[..self.world]
    }
}
