use std::io;
use std::time::Duration;

use shoal_core::Class;

use crate::tcp::HelloError;

/// Why ranks could not go on together. A group that has seen one is over; its ranks meet again
/// in a new one, of a higher epoch.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// Its process has ended, or it has left the group.
    #[error("rank {rank} is lost")]
    PeerLost {
        /// Which.
        rank: usize,
    },
    /// It is there but did not come to the meeting.
    #[error("rank {rank} was not heard of for {after:?}")]
    Timeout {
        /// Which.
        rank: usize,
        /// How long it was waited for.
        after: Duration,
    },
    /// A frame, or a rank, of another formation of the group.
    #[error("a frame of epoch {theirs} in epoch {ours}")]
    StaleEpoch {
        /// The epoch of this rank.
        ours: u64,
        /// That of the frame.
        theirs: u64,
    },
    /// The ranks do not do the same things in the same order.
    #[error("rank {rank} sent {got} words, not {expected}")]
    Mismatch {
        /// Who differs.
        rank: usize,
        /// The length of its frame.
        got: usize,
        /// The length of this rank's.
        expected: usize,
    },
    /// The ranks do not speak of the same call.
    #[error("rank {rank} sent no frame of this call")]
    Frame {
        /// Who differs.
        rank: usize,
    },
    /// A rank on another machine cannot be met.
    #[error("rank {rank} cannot be reached")]
    Unreachable {
        /// Which.
        rank: usize,
        /// Why.
        source: HelloError,
    },
    /// A frame larger than the group was made for.
    #[error("a frame of {words} words; the group takes {max}")]
    TooLarge {
        /// Words of the frame.
        words: usize,
        /// Words that fit.
        max: usize,
    },
    /// What is said to be a group's memory is none, or not this group's.
    #[error("the shared memory is not that of this group")]
    Segment,
    /// The operating system refused.
    #[error("the group's memory or sockets failed")]
    Io(#[from] io::Error),
}

impl CollectiveError {
    /// The rank that it is the fault of, where that is known.
    pub fn blamed(&self) -> Option<usize> {
        match self {
            Self::PeerLost { rank } | Self::Timeout { rank, .. } => Some(*rank),
            _ => None,
        }
    }

    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::TooLarge { .. } | Self::Segment => Class::Fatal,
            Self::Unreachable { source, .. } => source.class(),
            _ => Class::Retry,
        }
    }
}
