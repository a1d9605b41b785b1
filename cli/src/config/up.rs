//! `[up]`: the settings of a cluster on one machine.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_fabric::telemetry::{LogConfig, LogFormat};

use super::values::Time;
use super::{ConfigError, RouterSettings, Section, TraceSettings, WorkerSettings, log};
use crate::store::ModelSource;
use crate::up::UpConfig;

/// What a drain may take, unless set.
const DRAIN_TIMEOUT: Time = Time(Duration::from_secs(30));
/// For what a process does after its drain, before it counts as hung.
const LAST_STEPS: Duration = Duration::from_secs(10);

/// The cluster's settings as flags, variables and the file give them.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct UpSettings {
    /// Model: a GGUF file, hf://ORG/REPO/FILE[@REVISION], or demo [default: the worker's setting]
    #[arg(long, env = "SHOAL_UP_MODEL", value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// Address of the OpenAI HTTP API and gRPC [default: the router's setting]
    #[arg(long, env = "SHOAL_UP_LISTEN", value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,

    /// Worker processes; they share the machine's cores [default: 1]
    #[arg(long, env = "SHOAL_UP_REPLICAS", value_name = "N")]
    pub(crate) replicas: Option<usize>,

    /// Processes of each worker, which share its model [default: the worker's setting]
    #[arg(long, env = "SHOAL_UP_TENSOR_PARALLEL", value_name = "N")]
    pub(crate) tensor_parallel: Option<NonZeroUsize>,

    /// How long running requests may go on after Ctrl-C [default: 30s]
    #[arg(long, env = "SHOAL_UP_DRAIN_TIMEOUT", value_name = "TIME")]
    pub(crate) drain_timeout: Option<Time>,
}

impl Section for UpSettings {
    const NAME: &'static str = "up";
}

impl UpSettings {
    /// The model to serve: the cluster's own setting, else the worker's.
    pub(crate) fn source(&self, worker: &WorkerSettings) -> Result<ModelSource, ConfigError> {
        match self.model.as_ref().or(worker.model.as_ref()) {
            Some(name) => Ok(name.parse()?),
            None => Ok(ModelSource::default()),
        }
    }

    /// The configuration of a cluster that serves the file at `model`. Its processes read `file`
    /// and the environment themselves; only what the cluster decides is passed on.
    pub(crate) fn config(
        self,
        model: PathBuf,
        file: Option<&Path>,
        log: &LogConfig,
        trace: &TraceSettings,
        router: &RouterSettings,
        worker: &WorkerSettings,
    ) -> Result<UpConfig, ConfigError> {
        let replicas = self.replicas.unwrap_or(1);
        if replicas == 0 {
            return Err(ConfigError::NoReplicas);
        }
        let role = |name: &str| {
            let mut arguments = log::arguments(name, log);
            arguments.push("--supervised".to_owned());
            arguments.extend(trace.arguments());
            if let Some(file) = file {
                arguments.extend(["--config".to_owned(), file.display().to_string()]);
            }
            arguments
        };
        let mut router_arguments = role("router");
        if let Some(listen) = self.listen {
            router_arguments.extend(["--listen".to_owned(), listen.to_string()]);
        }
        let mut worker_arguments = role("worker");
        worker_arguments.extend(["--listen".to_owned(), "127.0.0.1:0".to_owned()]);
        worker_arguments.extend(["--model".to_owned(), model.display().to_string()]);
        let ranks = self.tensor_parallel.or(worker.tensor_parallel);
        let ranks = ranks.map_or(1, NonZeroUsize::get);
        if let Some(ranks) = self.tensor_parallel {
            worker_arguments.extend(["--tensor-parallel".to_owned(), ranks.to_string()]);
        }
        if replicas > 1 && worker.threads.is_none() {
            let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
            let share = (cores / (replicas * ranks)).max(1);
            worker_arguments.extend(["--threads".to_owned(), share.to_string()]);
        }
        let drain_timeout = self.drain_timeout.unwrap_or(DRAIN_TIMEOUT);
        // A role's own setting wins; it has to end by itself before it is killed.
        let patience = |own: Option<Time>, arguments: &mut Vec<String>| {
            if own.is_none() {
                arguments.extend(["--drain".to_owned(), drain_timeout.to_string()]);
            }
            own.unwrap_or(drain_timeout).0 + LAST_STEPS
        };
        Ok(UpConfig {
            replicas,
            router_patience: patience(router.drain, &mut router_arguments),
            worker_patience: patience(worker.drain, &mut worker_arguments),
            router: router_arguments,
            worker: worker_arguments,
            prefixed: log.format == LogFormat::Human,
            model,
            tls: router.tls_cert.is_some(),
        })
    }
}
