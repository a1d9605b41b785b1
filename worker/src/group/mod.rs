//! A tensor-parallel group: rank 0 is the worker. On one machine the others are processes that it
//! starts, supervises and starts again; between machines they [come](remote) by themselves.

mod backend;
mod leader;
mod line;
mod member;
mod price;
mod rank;
mod remote;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;

use shoal_collective::tcp::{HelloError, SecretError};
use shoal_collective::{Collective, CollectiveError, Pace};
use shoal_core::Class;
use shoal_engine::backend::BackendError;
use tokio::sync::watch;

pub(crate) use backend::GroupBackend;
pub(crate) use line::Part;
pub use member::RankCommand;
pub(crate) use price::Price;
pub use rank::run_rank;
pub use remote::join_group;

/// How rank 0 keeps the other ranks together.
trait Lead: Send {
    /// Says what every rank's id must be.
    fn expect(&mut self, numerics_id: [u8; 32]);

    /// The first rank of the last formation that has died.
    fn dead(&mut self) -> Option<usize>;

    /// Ends a rank: it is lost, or hangs.
    fn end(&mut self, rank: usize);

    /// Makes the group whole, under a higher epoch, for frames of up to `words` words; ranks that
    /// live keep their weights. `None` after a moment if it waits for ranks that it cannot start.
    ///
    /// # Errors
    /// When it will not be whole.
    fn form(&mut self, words: usize) -> Result<Option<Formed>, GroupError>;
}

/// A group that is whole.
struct Formed {
    /// Rank 0's.
    seat: Box<dyn Collective>,
    /// How quick it is, where that is not known without.
    pace: Option<Pace>,
}

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
    /// Ranks on other machines have no place to come to.
    #[error("cannot listen for ranks on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The group has no secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Rank 0 does not take this rank, or is none that this rank trusts.
    #[error("this rank cannot join its group")]
    Join {
        /// Why.
        source: HelloError,
    },
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
