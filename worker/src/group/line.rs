//! What rank 0 and another rank say to each other outside of steps: JSON over a unix socket,
//! whose end is the end of the rank.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shoal_collective::fd;

/// What rank 0 tells a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// Load this part of the model.
    Load(Part),
    /// Take the seat in the memory that comes with this.
    Meet {
        /// The formation of the group.
        epoch: u64,
        /// How long to wait for another rank within a step, milliseconds.
        patience_ms: u64,
    },
}

/// A rank's part of a model, how it computes, and the limits of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) model: PathBuf,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Longest prompt + output, tokens.
    pub(crate) context: usize,
    /// An instruction set by its name.
    pub(crate) isa: String,
    /// How prompts are computed, by its name.
    pub(crate) prompts: String,
    pub(crate) threads: usize,
    /// What keys and values are kept as, by its name.
    pub(crate) kv: String,
    /// What the parts of sums are rounded to, by its name.
    pub(crate) payload: String,
    pub(crate) pages: u32,
    pub(crate) max_rows: usize,
    pub(crate) max_logit_rows: usize,
}

/// What a rank tells rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Report {
    /// It has its part; all ranks must have the same id.
    Loaded {
        /// The numerics id.
        numerics_id: [u8; 32],
    },
    /// It cannot have it.
    Failed {
        /// Why.
        message: String,
    },
}

/// Sends a message, and a file with it.
pub(super) fn send<T: Serialize>(
    line: &UnixStream,
    message: &T,
    file: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    fd::send(line, &serde_json::to_vec(message)?, file)
}

/// Waits for a message; `None` at the end of the line.
pub(super) fn receive<T: DeserializeOwned>(
    line: &UnixStream,
) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let Some((message, file)) = fd::receive(line)? else {
        return Ok(None);
    };
    Ok(Some((serde_json::from_slice(&message)?, file)))
}
