//! `[worker]`: the settings of a worker.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_fabric::net::{Limits, ListenConfig, Network};
use shoal_fabric::telemetry::LogConfig;
use shoal_worker::{WorkerConfig, parse_isa, parse_kv_type, parse_prompts};

use super::values::{Size, Time};
use super::{ConfigError, Section, tls};

/// A worker's settings as flags, variables and the file give them.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Worker")]
pub(crate) struct WorkerSettings {
    /// Model: a GGUF file, hf://ORG/REPO/FILE[@REVISION], or demo [default: demo]
    #[arg(long, env = "SHOAL_WORKER_MODEL", value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// What it is for: serve answers requests; draft runs ahead of what other workers answer, with
    /// a small model of their tokenizer [default: serve]
    #[arg(long, env = "SHOAL_WORKER_ROLE", value_name = "serve|draft")]
    pub(crate) role: Option<String>,

    /// Name that clients ask for [default: the file's name without .gguf]
    #[arg(long, env = "SHOAL_WORKER_NAME", value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// Address of gRPC, probes and metrics; port 0 takes a free one [default: 127.0.0.1:9090].
    /// A rank that joins a group has probes and metrics there, if it is given
    #[arg(long, env = "SHOAL_WORKER_LISTEN", value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,

    /// Address that routers reach it at, as membership tells them [default: where it listens]
    #[arg(long, env = "SHOAL_WORKER_ADVERTISE", value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,

    /// Name of its group in the cluster, for status and drains [default: that address]
    #[arg(long, env = "SHOAL_WORKER_GROUP", value_name = "NAME")]
    pub(crate) group: Option<String>,

    /// What runs the model: cpu, or candle, the portable fallback [default: cpu]
    #[arg(long, env = "SHOAL_WORKER_BACKEND", value_name = "BACKEND")]
    pub(crate) backend: Option<String>,

    /// Instruction set of the cpu backend: scalar, neon, avx2, avx512 or avx512bf16
    /// [default: the machine's best]
    #[arg(long, env = "SHOAL_ISA", value_name = "ISA")]
    pub(crate) isa: Option<String>,

    /// Activations of prompts on the cpu backend: int8 as those of answers; or, 20 times closer to
    /// float32, bf16, or bf16-tiles in the order of AMX [default: bf16-tiles with AMX, else int8]
    #[arg(
        long,
        env = "SHOAL_WORKER_PROMPT_PRECISION",
        value_name = "int8|bf16|bf16-tiles"
    )]
    pub(crate) prompt_precision: Option<String>,

    /// Processes that share the model, each with a part of it; on this machine, unless they join
    /// from others [default: 1]
    #[arg(long, env = "SHOAL_WORKER_TENSOR_PARALLEL", value_name = "N")]
    pub(crate) tensor_parallel: Option<NonZeroUsize>,

    /// How long a process of the group may keep the others waiting before it counts as hung and is
    /// started again, or awaited from another machine [default: 2s]
    #[arg(long, env = "SHOAL_WORKER_RANK_TIMEOUT", value_name = "TIME")]
    pub(crate) rank_timeout: Option<Time>,

    /// Address where processes of the group join from other machines, instead of being started
    /// here; of one that joins, where those of higher ranks reach it [default there: 0.0.0.0:0]
    #[arg(long, env = "SHOAL_WORKER_RANK_LISTEN", value_name = "ADDRESS")]
    pub(crate) rank_listen: Option<SocketAddr>,

    /// Join a group as a rank of it: where its rank 0 listens for ranks. Rank 0 decides all but
    /// the model's file, the threads and the instruction set
    #[arg(long, env = "SHOAL_WORKER_JOIN", value_name = "HOST:PORT")]
    pub(crate) join: Option<String>,

    /// Which rank it joins as, from 1 to the number of processes less 1
    #[arg(long, env = "SHOAL_WORKER_RANK", value_name = "RANK")]
    pub(crate) rank: Option<usize>,

    /// File with the secret of a group between machines, at least 16 bytes, equal on all
    #[arg(long, env = "SHOAL_WORKER_RANK_SECRET", value_name = "FILE")]
    pub(crate) rank_secret: Option<PathBuf>,

    /// What machines of a group round the numbers to that they exchange: f32, bf16 or int8
    /// [default: bf16]
    #[arg(long, env = "SHOAL_WORKER_RANK_PAYLOAD", value_name = "TYPE")]
    pub(crate) rank_payload: Option<String>,

    /// Threads that compute, in each process [default: an equal share of the CPUs]
    #[arg(long, env = "SHOAL_WORKER_THREADS", value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,

    /// What the cpu backend keeps keys and values as: int16, bf16, or int8, which takes half the
    /// memory [default: int16]
    #[arg(long, env = "SHOAL_WORKER_KV_TYPE", value_name = "TYPE")]
    pub(crate) kv_type: Option<String>,

    /// Memory of the KV cache, such as 512MiB
    /// [default: a quarter of what is available, at most 1GiB]
    #[arg(long, env = "SHOAL_WORKER_KV_SIZE", value_name = "SIZE")]
    pub(crate) kv_size: Option<Size>,

    /// Longest prompt and output together, in tokens [default: the model's]
    #[arg(long, env = "SHOAL_WORKER_CONTEXT", value_name = "TOKENS")]
    pub(crate) context: Option<usize>,

    /// Most sequences that run at one time [default: 128]
    #[arg(long, env = "SHOAL_WORKER_MAX_RUNNING", value_name = "N")]
    pub(crate) max_running: Option<usize>,

    /// Most sequences that wait; one more is refused [default: 1024]
    #[arg(long, env = "SHOAL_WORKER_MAX_WAITING", value_name = "N")]
    pub(crate) max_waiting: Option<usize>,

    /// Most rows (tokens) of an engine step [default: 512]
    #[arg(long, env = "SHOAL_WORKER_STEP_ROWS", value_name = "N")]
    pub(crate) step_rows: Option<usize>,

    /// Most prompt rows of an engine step [default: 256]
    #[arg(long, env = "SHOAL_WORKER_PREFILL_CHUNK", value_name = "N")]
    pub(crate) prefill_chunk: Option<usize>,

    /// Prompts are added to a step only while it is expected to end within this [default: 50ms]
    #[arg(long, env = "SHOAL_WORKER_ITL_TARGET", value_name = "TIME")]
    pub(crate) itl_target: Option<Time>,

    /// Time in the queue that counts as one level of priority [default: 10s]
    #[arg(long, env = "SHOAL_WORKER_PRIORITY_AGING", value_name = "TIME")]
    pub(crate) priority_aging: Option<Time>,

    /// Whether prompts share the pages of their common beginnings [default: true]
    #[arg(long, env = "SHOAL_WORKER_PREFIX_CACHE", value_name = "true|false",
          num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) prefix_cache: Option<bool>,

    /// Drafts that are verified for requests that do not say: auto, off, or so many tokens a step;
    /// off is off for all requests [default: auto]
    #[arg(long, env = "SHOAL_WORKER_SPECULATION", value_name = "auto|off|N")]
    pub(crate) speculation: Option<String>,

    /// Memory of the texts that draft [default: 64MiB]
    #[arg(long, env = "SHOAL_WORKER_CORPUS_SIZE", value_name = "SIZE")]
    pub(crate) corpus_size: Option<Size>,

    /// How long a text drafts [default: 1day]
    #[arg(long, env = "SHOAL_WORKER_CORPUS_TTL", value_name = "TIME")]
    pub(crate) corpus_ttl: Option<Time>,

    /// Most routers that are connected at one time [default: 256]
    #[arg(long, env = "SHOAL_WORKER_MAX_SESSIONS", value_name = "N")]
    pub(crate) max_sessions: Option<usize>,

    /// Output that a router may leave unread before it is cut off [default: 64MiB]
    #[arg(long, env = "SHOAL_WORKER_SESSION_BACKLOG", value_name = "SIZE")]
    pub(crate) session_backlog: Option<Size>,

    /// How long running sequences may go on after a signal [default: 30s]
    #[arg(long, env = "SHOAL_WORKER_DRAIN", value_name = "TIME")]
    pub(crate) drain: Option<Time>,

    /// Certificate chain (PEM) of the listener; plain text without it
    #[arg(long, env = "SHOAL_WORKER_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(long, env = "SHOAL_WORKER_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,

    /// Authority (PEM) that routers' certificates must come from
    #[arg(long, env = "SHOAL_WORKER_TLS_CLIENT_CA", value_name = "FILE")]
    pub(crate) tls_client_ca: Option<PathBuf>,
}

impl Section for WorkerSettings {
    const NAME: &'static str = "worker";
}

/// Where a worker listens, unless set.
const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);

impl WorkerSettings {
    /// Its own port at `address`.
    pub(super) fn listen_config(&self, address: SocketAddr) -> Result<ListenConfig, ConfigError> {
        let (cert, key) = (self.tls_cert.clone(), self.tls_key.clone());
        Ok(ListenConfig {
            network: Network::Tcp,
            address,
            tls: tls::server(Self::NAME, cert, key, self.tls_client_ca.clone())?,
            limits: Limits::default(),
        })
    }

    /// The configuration of a worker that serves the file at `model`, and whose other ranks log
    /// as `log` says.
    pub(crate) fn config(
        self,
        model: PathBuf,
        log: &LogConfig,
    ) -> Result<WorkerConfig, ConfigError> {
        let tensor_parallel = self.group_config(log)?;
        let listen = self.listen_config(self.listen.unwrap_or(LISTEN))?;
        let default = WorkerConfig::new(model, listen);
        let time = |given: Option<Time>, default| given.map_or(default, |time| time.0);
        let mut engine = default.engine;
        engine.max_running = self.max_running.unwrap_or(engine.max_running);
        engine.max_waiting = self.max_waiting.unwrap_or(engine.max_waiting);
        engine.step_rows = self.step_rows.unwrap_or(engine.step_rows);
        engine.prefill_chunk = self.prefill_chunk.unwrap_or(engine.prefill_chunk);
        engine.itl_target = time(self.itl_target, engine.itl_target);
        engine.priority_aging = time(self.priority_aging, engine.priority_aging);
        engine.prefix_cache = self.prefix_cache.unwrap_or(engine.prefix_cache);
        if let Some(speculation) = self.speculation {
            engine.speculation = speculation.parse()?;
        }
        let bytes = |given: Option<Size>, default| given.map_or(default, Size::bytes);
        let backend = match self.backend {
            Some(name) => name.parse()?,
            None => default.backend,
        };
        Ok(WorkerConfig {
            role: match self.role {
                Some(name) => name.parse()?,
                None => default.role,
            },
            name: self.name,
            group: self.group,
            advertise: self.advertise.map(|address| address.parse()).transpose()?,
            backend,
            isa: self.isa.as_deref().map(parse_isa).transpose()?,
            prompts: self
                .prompt_precision
                .as_deref()
                .map(parse_prompts)
                .transpose()?,
            tensor_parallel,
            threads: self.threads,
            kv_type: self.kv_type.as_deref().map(parse_kv_type).transpose()?,
            kv_bytes: self.kv_size.map(|size| size.0),
            context: self.context,
            engine,
            max_sessions: self.max_sessions.unwrap_or(default.max_sessions),
            session_backlog: bytes(self.session_backlog, default.session_backlog),
            corpus_bytes: bytes(self.corpus_size, default.corpus_bytes),
            corpus_ttl: time(self.corpus_ttl, default.corpus_ttl),
            drain: time(self.drain, default.drain),
            ..default
        })
    }
}
