use shoal_core::Class;
use shoal_engine::engine::EngineError;
use shoal_fabric::{membership::EndpointError, net::NetError};

use crate::{config::ConfigError, group::GroupError, load::LoadError};

/// Why a worker ended, or never came up.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It cannot listen.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The socket's address.
    #[error("the listener's address")]
    Address(#[source] std::io::Error),
    /// The address is none that others could reach.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// gRPC reflection cannot be set up.
    #[error("gRPC reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The model cannot be loaded.
    #[error("cannot load {}", path.display())]
    Load {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: LoadError,
    },
    /// This rank cannot be one of its group.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The operating system gave no thread to load on.
    #[error("cannot start the loading thread")]
    LoadThread(#[source] std::io::Error),
    /// Loading broke off; the log has the panic.
    #[error("loading the model broke off")]
    LoadBroken,
    /// The engine was not started.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine took no first sequence.
    #[error("the model cannot run")]
    WarmUp(#[from] shoal_engine::request::SubmitError),
    /// The model's first forward pass failed; the log has the step's error.
    #[error("the model's first run failed{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    FirstRun {
        /// Why the engine stopped, where it did.
        reason: Option<String>,
    },
    /// The engine stopped under the worker.
    #[error("the engine has stopped: {0}")]
    EngineStopped(String),
}

impl WorkerError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Config(error) => error.class(),
            Self::Net(error) => error.class(),
            Self::Load { source, .. } => source.class(),
            Self::Engine(error) => error.class(),
            Self::Endpoint(error) => error.class(),
            Self::Group(error) => error.class(),
            Self::WarmUp(_)
            | Self::FirstRun { .. }
            | Self::Address(_)
            | Self::Reflection(_)
            | Self::LoadThread(_)
            | Self::LoadBroken => Class::Fatal,
            // A new process may do.
            Self::EngineStopped(_) => Class::Retry,
        }
    }
}
