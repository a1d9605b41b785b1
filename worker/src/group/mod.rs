//! A tensor-parallel group on one machine: rank 0 is the worker, the others are processes that
//! it starts, supervises and starts again.

mod backend;
mod leader;
mod line;
mod member;
mod rank;

use std::io;
use std::sync::atomic::AtomicBool;

use shoal_collective::CollectiveError;
use shoal_core::Class;
use shoal_engine::backend::BackendError;
use tokio::sync::watch;

pub(crate) use backend::GroupBackend;
pub(crate) use line::Part;
pub use member::RankCommand;
pub use rank::run_rank;

/// What the worker sees of its group.
#[derive(Debug)]
pub struct Watch {
    /// Whether all ranks have met and none is known to be lost. Set by the engine's thread alone.
    pub(crate) whole: watch::Sender<bool>,
    /// Processes that have ended: a reason to look.
    pub(crate) deaths: watch::Sender<u64>,
    /// The worker ends: the group is not mended any more.
    pub(crate) closing: AtomicBool,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self {
            whole: watch::Sender::new(false),
            deaths: watch::Sender::new(0),
            closing: AtomicBool::new(false),
        }
    }
}

/// Why a group could not be formed.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// A process could not be started or told.
    #[error("rank {rank} cannot be started")]
    Start {
        /// Which.
        rank: usize,
        /// Why.
        source: io::Error,
    },
    /// It has no part of the model.
    #[error("rank {rank} cannot load its part: {message}")]
    Load {
        /// Which.
        rank: usize,
        /// Why, in its words.
        message: String,
    },
    /// It ended while it loaded.
    #[error("rank {rank} has ended while it loaded")]
    Died {
        /// Which.
        rank: usize,
    },
    /// It did not load in time.
    #[error("rank {rank} is still loading")]
    Slow {
        /// Which.
        rank: usize,
    },
    /// Its file, or its program, is another.
    #[error("rank {rank} has other weights or another version")]
    Different {
        /// Which.
        rank: usize,
    },
    /// The ranks did not come together.
    #[error("the ranks did not meet")]
    Meeting(#[from] CollectiveError),
    /// There is no memory for them to meet in.
    #[error("no shared memory")]
    Memory(#[from] io::Error),
    /// This rank's line to rank 0 broke.
    #[error("the line to rank 0")]
    Line(#[source] io::Error),
    /// Rank 0 called to a meeting before it said what to load.
    #[error("called to meet without a part of the model")]
    Order,
    /// A rank cannot do its share of a step.
    #[error("a step that this rank cannot take part in")]
    Step(#[source] BackendError),
    /// The worker ends.
    #[error("the worker is shutting down")]
    Closing,
}

impl GroupError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self.is_passing() {
            true => Class::Retry,
            false => Class::Fatal,
        }
    }

    /// Whether another attempt may do.
    fn is_passing(&self) -> bool {
        match self {
            Self::Start { .. } | Self::Died { .. } | Self::Slow { .. } => true,
            Self::Meeting(error) => error.class() == Class::Retry,
            _ => false,
        }
    }
}
