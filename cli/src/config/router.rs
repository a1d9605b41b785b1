//! `[router]`: the settings of a router.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_fabric::tls::ClientTls;
use shoal_router::{LedgerConfig, RouterArgs};

use super::values::{Size, Time};
use super::{ConfigError, Section, tls};

/// A router's settings as flags, variables and the file give them.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Router")]
pub(crate) struct RouterSettings {
    /// Address of the OpenAI HTTP API and gRPC; port 0 takes a free one [default: 127.0.0.1:8080]
    #[arg(long, env = "SHOAL_ROUTER_LISTEN", value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,

    /// Address that others reach it at, as membership tells them [default: where it listens]
    #[arg(long, env = "SHOAL_ROUTER_ADVERTISE", value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,

    /// Its name among the routers [default: that address]
    #[arg(long, env = "SHOAL_ROUTER_NAME", value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// The workers, where no membership is set that tells of them
    #[arg(
        long,
        env = "SHOAL_ROUTER_WORKERS",
        value_name = "HOST:PORT,…",
        value_delimiter = ','
    )]
    pub(crate) workers: Option<Vec<String>>,

    /// Other routers, besides those that a membership tells of; all routers may be listed
    #[arg(
        long,
        env = "SHOAL_ROUTER_PEERS",
        value_name = "HOST:PORT,…",
        value_delimiter = ','
    )]
    pub(crate) peers: Option<Vec<String>>,

    /// API key to show to other routers: one with `router = true`
    #[arg(
        long,
        env = "SHOAL_ROUTER_PEER_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub(crate) peer_key: Option<String>,

    /// Authority (PEM) of the other routers' certificates; they are shown the worker_cert; needed
    /// where their listeners have TLS
    #[arg(long, env = "SHOAL_ROUTER_PEER_CA", value_name = "FILE")]
    pub(crate) peer_ca: Option<PathBuf>,

    /// File of hashed API keys (TOML); without it every caller is the tenant `default`
    #[arg(long, env = "SHOAL_ROUTER_API_KEYS", value_name = "FILE")]
    pub(crate) api_keys: Option<PathBuf>,

    /// Most sequences at the workers at one time [default: 256]
    #[arg(long, env = "SHOAL_ROUTER_MAX_RUNNING", value_name = "N")]
    pub(crate) max_running: Option<u32>,

    /// Most requests that wait for that; further ones are refused [default: 1024]
    #[arg(long, env = "SHOAL_ROUTER_MAX_WAITING", value_name = "N")]
    pub(crate) max_waiting: Option<u32>,

    /// Largest body of a request [default: 8388608]
    #[arg(long, env = "SHOAL_ROUTER_MAX_BODY_BYTES", value_name = "BYTES")]
    pub(crate) max_body_bytes: Option<usize>,

    /// Deadline of a request that brings none, and the longest it may bring [default: 10m]
    #[arg(long, env = "SHOAL_ROUTER_REQUEST_TIMEOUT", value_name = "TIME")]
    pub(crate) request_timeout: Option<Time>,

    /// Output tokens of a request that sets no limit [default: as many as the context holds]
    #[arg(long, env = "SHOAL_ROUTER_DEFAULT_MAX_TOKENS", value_name = "N")]
    pub(crate) default_max_tokens: Option<u32>,

    /// How long a request waits where no worker takes it, new or with a lost worker [default: 30s]
    #[arg(long, env = "SHOAL_ROUTER_RESUME_WINDOW", value_name = "TIME")]
    pub(crate) resume_window: Option<Time>,

    /// For open answers after a signal; then they end with an error [default: 30s]
    #[arg(long, env = "SHOAL_ROUTER_DRAIN", value_name = "TIME")]
    pub(crate) drain: Option<Time>,

    /// Memory of the answers that draft for later ones [default: 256MiB]
    #[arg(long, env = "SHOAL_ROUTER_CORPUS_SIZE", value_name = "SIZE")]
    pub(crate) corpus_size: Option<Size>,

    /// How long an answer drafts [default: 1day]
    #[arg(long, env = "SHOAL_ROUTER_CORPUS_TTL", value_name = "TIME")]
    pub(crate) corpus_ttl: Option<Time>,

    /// Users of a tenant who must have been answered alike before the words draft for the others
    /// of it, 1 to 4 [default: 3]
    #[arg(long, env = "SHOAL_ROUTER_CORPUS_USERS", value_name = "N")]
    pub(crate) corpus_users: Option<usize>,

    /// How workers are chosen: cost, round-robin, least-load or power-of-two [default: cost]
    #[arg(long, env = "SHOAL_ROUTER_ROUTING", value_name = "ROUTING")]
    pub(crate) routing: Option<String>,

    /// A worker that says nothing for so long gets nothing new, and its streams move
    /// [default: 400ms]
    #[arg(long, env = "SHOAL_ROUTER_WORKER_SILENCE", value_name = "TIME")]
    pub(crate) worker_silence: Option<Time>,

    /// The same for one with work that makes no step for so long, unless a step is predicted
    /// to take long [default: 400ms]
    #[arg(long, env = "SHOAL_ROUTER_WORKER_STALL", value_name = "TIME")]
    pub(crate) worker_stall: Option<Time>,

    /// Certificate chain (PEM) of the listener; plain text without it
    #[arg(long, env = "SHOAL_ROUTER_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(long, env = "SHOAL_ROUTER_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,

    /// Authority (PEM) that clients' certificates must come from
    #[arg(long, env = "SHOAL_ROUTER_TLS_CLIENT_CA", value_name = "FILE")]
    pub(crate) tls_client_ca: Option<PathBuf>,

    /// Authority (PEM) of the workers' certificates; plain text to workers without it
    #[arg(long, env = "SHOAL_ROUTER_WORKER_CA", value_name = "FILE")]
    pub(crate) worker_ca: Option<PathBuf>,

    /// Certificate (PEM) to show to workers
    #[arg(long, env = "SHOAL_ROUTER_WORKER_CERT", value_name = "FILE")]
    pub(crate) worker_cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(long, env = "SHOAL_ROUTER_WORKER_KEY", value_name = "FILE")]
    pub(crate) worker_key: Option<PathBuf>,

    /// Name that the workers' certificates must hold [default: the host they are reached at]
    #[arg(long, env = "SHOAL_ROUTER_WORKER_DOMAIN", value_name = "NAME")]
    pub(crate) worker_domain: Option<String>,
}

impl Section for RouterSettings {
    const NAME: &'static str = "router";
}

impl TryFrom<RouterSettings> for RouterArgs {
    type Error = ConfigError;

    fn try_from(raw: RouterSettings) -> Result<Self, ConfigError> {
        let default = RouterArgs::default();
        let time = |given: Option<Time>, default| given.map_or(default, |time| time.0);
        let (cert, key) = (raw.worker_cert.clone(), raw.worker_key.clone());
        let peer_tls = raw.peer_ca.map(|ca| ClientTls {
            ca,
            cert,
            key,
            domain: None,
        });
        Ok(Self {
            peers: raw.peers.unwrap_or(default.peers),
            peer_key: raw.peer_key,
            peer_tls,
            listen: raw.listen.unwrap_or(default.listen),
            tls: tls::server("router", raw.tls_cert, raw.tls_key, raw.tls_client_ca)?,
            workers: raw.workers.unwrap_or(default.workers),
            membership: None,
            name: raw.name,
            advertise: raw.advertise.map(|address| address.parse()).transpose()?,
            worker_tls: tls::client(
                "router",
                "worker_ca for TLS to workers, and worker_cert and worker_key together",
                raw.worker_ca,
                raw.worker_cert,
                raw.worker_key,
                raw.worker_domain,
            )?,
            api_keys: raw.api_keys,
            max_running: raw.max_running.unwrap_or(default.max_running),
            max_waiting: raw.max_waiting.unwrap_or(default.max_waiting),
            max_body_bytes: raw.max_body_bytes.unwrap_or(default.max_body_bytes),
            request_timeout: time(raw.request_timeout, default.request_timeout),
            default_max_tokens: raw.default_max_tokens.or(default.default_max_tokens),
            resume_window: time(raw.resume_window, default.resume_window),
            drain: time(raw.drain, default.drain),
            routing: match raw.routing {
                Some(name) => name.parse()?,
                None => default.routing,
            },
            corpus: LedgerConfig {
                users: raw.corpus_users.unwrap_or(default.corpus.users),
                ttl: time(raw.corpus_ttl, default.corpus.ttl),
                bytes: raw.corpus_size.map_or(default.corpus.bytes, Size::bytes),
            },
            worker_silence: time(raw.worker_silence, default.worker_silence),
            worker_stall: time(raw.worker_stall, default.worker_stall),
            network: default.network,
        })
    }
}
