//! `[up]`: the settings of a cluster on one machine.

use std::net::SocketAddr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::Section;
use super::values::Time;

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

    /// How long running requests may go on after Ctrl-C [default: 30s]
    #[arg(long, env = "SHOAL_UP_DRAIN_TIMEOUT", value_name = "TIME")]
    pub(crate) drain_timeout: Option<Time>,
}

impl Section for UpSettings {
    const NAME: &'static str = "up";
}
