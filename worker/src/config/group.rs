//! The settings of ranks that share a model.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use shoal_collective::tcp::Payload;
use shoal_fabric::{membership::Endpoint, net::ListenConfig};
use shoal_kernels::Isa;

use super::{ConfigError, cpus};
use crate::group::RankCommand;

/// A tensor-parallel group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// Ranks, the worker itself included. At least 2.
    pub ranks: usize,
    /// Who the others are.
    pub others: Others,
    /// How long a rank is waited for within a step before it counts as hung.
    pub patience: Duration,
}

/// The other ranks of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Others {
    /// Processes of this machine, started so.
    Local(RankCommand),
    /// Processes elsewhere, which come.
    Remote(RemoteConfig),
}

/// Where ranks come to, and what they are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// Where rank 0 listens for them.
    pub listen: SocketAddr,
    /// A file with what the ranks know and nobody else.
    pub secret: PathBuf,
    /// What the parts of sums are rounded to between ranks.
    pub payload: Payload,
}

impl GroupConfig {
    /// What the parts of sums are rounded to between ranks.
    pub(crate) fn payload(&self) -> Payload {
        match &self.others {
            Others::Local(_) => Payload::F32,
            Others::Remote(remote) => remote.payload,
        }
    }
}

/// The settings of a rank whose rank 0 is elsewhere. All else rank 0 tells it.
#[derive(Clone, Debug)]
pub struct RankConfig {
    /// Its own copy of the GGUF file.
    pub model: PathBuf,
    /// Which rank it is, from 1.
    pub rank: usize,
    /// Ranks of the group.
    pub world: usize,
    /// Where rank 0 listens for ranks.
    pub join: Endpoint,
    /// Where it listens for the ranks above it, if there are any.
    pub listen: SocketAddr,
    /// Where its probes and metrics are, if anywhere.
    pub probes: Option<ListenConfig>,
    /// A file with what the ranks know and nobody else.
    pub secret: PathBuf,
    /// Instruction set; absent is the best of the machine.
    pub isa: Option<Isa>,
    /// Threads that compute; absent is every CPU.
    pub threads: Option<NonZeroUsize>,
}

impl RankConfig {
    /// Checks what can be checked without rank 0.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let (rank, world) = (self.rank, self.world);
        if !(1..world).contains(&rank) {
            return Err(ConfigError::Rank { rank, world });
        }
        match self.isa.filter(|isa| !isa.is_available()) {
            Some(isa) => Err(ConfigError::IsaMissing { isa }),
            None => Ok(()),
        }
    }

    /// Threads that compute.
    pub(crate) fn threads(&self) -> usize {
        self.threads.map_or_else(cpus, usize::from)
    }
}
