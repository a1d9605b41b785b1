//! Settings: flag, else environment variable, else configuration file, else default.
//!
//! Each subsystem has one raw struct of optional fields ([`Section`]). Clap fills it from flags
//! and environment, the file fills the gaps, and one `TryFrom` turns the result into the
//! subsystem's validated configuration.

mod file;
mod log;
mod membership;
mod ranks;
mod router;
mod store;
#[cfg(test)]
mod tests;
mod tls;
mod trace;
mod up;
mod values;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use shoal_core::Class;
use shoal_fabric::membership::{EndpointError, MembershipError};

pub(crate) use file::{ConfigFile, Section};
pub(crate) use log::LogSettings;
pub(crate) use membership::MembershipSettings;
pub(crate) use router::RouterSettings;
pub(crate) use store::StoreSettings;
pub(crate) use trace::TraceSettings;
pub(crate) use up::UpSettings;
pub(crate) use values::Time;
pub(crate) use worker::WorkerSettings;

use crate::store::SourceError;

/// Why the settings do not hold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration file {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: {message}")]
    Syntax {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("{path}: unknown key {key:?}; the nearest known one is {nearest:?}")]
    UnknownKey {
        path: PathBuf,
        key: String,
        nearest: String,
    },
    #[error("{path}: {key:?} is a section: write [{key}]")]
    NotASection { path: PathBuf, key: String },
    #[error("{path}: {key}: {message}")]
    Value {
        path: PathBuf,
        key: String,
        message: String,
    },
    #[error("{section}: expected {expected}")]
    Incomplete {
        section: &'static str,
        expected: &'static str,
    },
    #[error("the model's name is wrong")]
    Model(#[from] SourceError),
    #[error(transparent)]
    Worker(#[from] shoal_worker::ConfigError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error(
        "{section}.advertise is needed: others cannot reach this process at {listen}, where it listens"
    )]
    Unreachable {
        section: &'static str,
        listen: SocketAddr,
    },
    #[error("workers and membership both tell who the workers are: set one of them")]
    TwoMemberships,
    #[error(transparent)]
    Routing(#[from] shoal_router::RoutingError),
    #[error("the path of this program is unknown")]
    Program(#[source] io::Error),
    #[error(transparent)]
    Speculation(#[from] shoal_core::SpeculationError),
    #[error("replicas must be at least 1")]
    NoReplicas,
    #[error("the environment holds a wrong value")]
    Environment(#[source] clap::Error),
    #[error("the settings cannot be merged")]
    Merge(#[source] toml::ser::Error),
    #[error("the settings cannot be merged")]
    Unmerge(#[source] toml::de::Error),
}

impl ConfigError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        Class::Client
    }
}
