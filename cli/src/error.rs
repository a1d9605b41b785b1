//! What a command ends with, and how it is told.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use shoal_core::Class;
use shoal_fabric::telemetry::TelemetryError;
use shoal_gguf::GgufError;
use shoal_router::RouterError;
use shoal_worker::WorkerError;

use crate::bench::BenchError;
use crate::bench::engine::EngineBenchError;
use crate::chat::ChatError;
use crate::config::ConfigError;
use crate::corpus::CorpusError;
use crate::operate::OperateError;
use crate::store::StoreError;
use crate::up::UpError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("logs cannot be set up")]
    Log(#[from] TelemetryError),
    #[error("the runtime cannot be started")]
    Runtime(#[source] io::Error),
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{path} is no usable model")]
    Model { path: PathBuf, source: GgufError },
    #[error(transparent)]
    Router(#[from] RouterError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error(transparent)]
    Up(#[from] UpError),
    #[error("signals cannot be caught")]
    Signals(#[source] io::Error),
    #[error("the supervisor cannot be reached")]
    Supervisor(#[source] io::Error),
    #[error("a task failed")]
    Task(#[from] tokio::task::JoinError),
    #[error("the settings cannot be printed")]
    Print(#[from] toml::ser::Error),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Bench(#[from] BenchError),
    #[error(transparent)]
    Operate(#[from] OperateError),
    #[error("{path} cannot be measured")]
    EngineBench {
        path: PathBuf,
        source: EngineBenchError,
    },
    #[error(transparent)]
    Corpus(#[from] CorpusError),
}

impl CliError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Config(error) => error.class(),
            Self::Log(error) => error.class(),
            Self::Runtime(_)
            | Self::Output(_)
            | Self::Write { .. }
            | Self::Signals(_)
            | Self::Supervisor(_)
            | Self::Task(_)
            | Self::Print(_) => Class::Fatal,
            Self::Router(error) => error.class(),
            Self::Worker(error) => error.class(),
            Self::Up(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Model { source, .. } => source.class(),
            Self::Chat(error) => error.class(),
            Self::Bench(error) => error.class(),
            Self::Operate(error) => error.class(),
            Self::EngineBench { source, .. } => source.class(),
            Self::Corpus(error) => error.class(),
        }
    }
}

/// The error and its causes in one line. A cause whose text the line holds already is left out:
/// some libraries repeat their source in their own message.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}
