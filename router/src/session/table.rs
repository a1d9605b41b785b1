//! The sequences that a session carries, and what is to be sent about them.

use std::{collections::HashMap, sync::Arc};

use shoal_proto::worker::{Cancel, Draft, Follow};

use super::slot::Slot;

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) slot: Arc<Slot>,
    /// Tokens to prefill, until the first output shows that they are computed.
    pub(super) unstarted: u64,
    /// The worker is told to end it.
    pub(super) cancelled: bool,
    /// The worker is told of it.
    pub(super) sent: bool,
    /// Not yet sent: the newest guesses at its tokens.
    pub(super) draft: Option<Draft>,
    /// Not yet sent: what the sequence has that it runs ahead of.
    pub(super) follow: Option<Follow>,
}

impl Entry {
    /// Of a sequence that is not yet sent.
    pub(super) fn new(slot: Arc<Slot>, unstarted: u64) -> Self {
        Self {
            slot,
            unstarted,
            cancelled: false,
            sent: false,
            draft: None,
            follow: None,
        }
    }

    /// Whether there is something to be sent about it.
    pub(super) fn is_noted(&self) -> bool {
        self.draft.is_some() || self.follow.is_some()
    }
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) entries: HashMap<u64, Entry>,
    /// Sum of the entries' `unstarted`.
    pub(super) unstarted: u64,
    /// Not yet sent; at most one per attempt.
    pub(super) cancels: Vec<Cancel>,
    /// Sequences that the worker has, with something to be sent about them. One may be gone.
    pub(super) noted: Vec<u64>,
    pub(super) closed: bool,
}

impl Table {
    /// A sequence's entry, if it is this attempt that is here.
    pub(super) fn attempt(&mut self, sequence: u64, attempt: u32) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&sequence)?;
        (entry.slot.attempt == attempt).then_some(entry)
    }

    pub(super) fn remove(&mut self, sequence: u64, attempt: u32) -> Option<Entry> {
        self.attempt(sequence, attempt)?;
        let entry = self.entries.remove(&sequence)?;
        self.unstarted -= entry.unstarted;
        Some(entry)
    }
}

/// What this router has placed on a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Sequences without their end.
    pub(crate) sequences: u32,
    /// Tokens to prefill of those without an output.
    pub(crate) unstarted_tokens: u64,
}

impl Placed {
    /// Without one sequence, of which so many tokens wait for their prefill.
    pub(crate) fn without(self, unstarted: u64) -> Self {
        Self {
            sequences: self.sequences.saturating_sub(1),
            unstarted_tokens: self.unstarted_tokens.saturating_sub(unstarted),
        }
    }
}
