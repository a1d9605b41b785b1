//! A worker's settings.

mod group;

use std::{
    fmt, num::NonZeroUsize, path::PathBuf, str::FromStr, sync::Arc, thread::available_parallelism,
    time::Duration,
};

use shoal_collective::tcp::Payload;
use shoal_core::{Class, PAGE_TOKENS};
use shoal_engine::{config::EngineConfig, cpu::PromptPrecision};
use shoal_fabric::{
    membership::{Endpoint, Member, Membership, Static},
    net::ListenConfig,
};
use shoal_kernels::{isa::Isa, kv::KvType};

pub use group::{GroupConfig, Others, RankConfig, RemoteConfig};

/// What runs the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// Shoal's own kernels.
    #[default]
    Cpu,
    /// `candle-core`: the portable fallback.
    Candle,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Candle => "candle",
        })
    }
}

impl FromStr for BackendKind {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "cpu" => Ok(Self::Cpu),
            "candle" => Ok(Self::Candle),
            _ => Err(ConfigError::Backend { given: s.into() }),
        }
    }
}

/// What a worker is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkerRole {
    /// It answers requests.
    #[default]
    Serve,
    /// It runs ahead of what other workers answer, and takes no requests.
    Draft,
}

impl FromStr for WorkerRole {
    type Err = ConfigError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "serve" => Ok(Self::Serve),
            "draft" => Ok(Self::Draft),
            _ => Err(ConfigError::Role { given: s.into() }),
        }
    }
}

/// An instruction set by its name: `scalar`, `neon`, `avx2`, `avx512` or `avx512bf16`.
///
/// # Errors
/// When the name is another.
pub fn parse_isa(name: &str) -> Result<Isa, ConfigError> {
    match name {
        "scalar" => Ok(Isa::Scalar),
        "neon" => Ok(Isa::Neon),
        "avx2" => Ok(Isa::Avx2),
        "avx512" => Ok(Isa::Avx512),
        "avx512bf16" => Ok(Isa::Avx512Bf16),
        _ => Err(ConfigError::Isa { given: name.into() }),
    }
}

/// The name of an instruction set.
pub(crate) fn isa_name(isa: Isa) -> &'static str {
    match isa {
        Isa::Scalar => "scalar",
        Isa::Neon => "neon",
        Isa::Avx2 => "avx2",
        Isa::Avx512 => "avx512",
        Isa::Avx512Bf16 => "avx512bf16",
    }
}

/// How prompts are computed, by its name: `int8`, `bf16` or `bf16-tiles`.
///
/// # Errors
/// When the name is another.
pub fn parse_prompts(name: &str) -> Result<PromptPrecision, ConfigError> {
    PromptPrecision::ALL
        .into_iter()
        .find(|prompts| prompts.name() == name)
        .ok_or_else(|| ConfigError::Prompts { given: name.into() })
}

/// What keys and values are kept as by its name: `bf16`, `int16` or `int8`.
///
/// # Errors
/// When the name is another.
pub fn parse_kv_type(name: &str) -> Result<KvType, ConfigError> {
    let found = KvType::ALL.into_iter().find(|kv| kv.name() == name);
    found.ok_or_else(|| ConfigError::KvType { given: name.into() })
}

/// What the parts of sums are rounded to between ranks by its name: `f32`, `bf16` or `int8`.
///
/// # Errors
/// When the name is another.
pub fn parse_payload(name: &str) -> Result<Payload, ConfigError> {
    let mut all = Payload::ALL.into_iter();
    all.find(|payload| payload.name() == name)
        .ok_or_else(|| ConfigError::Payload { given: name.into() })
}

/// CPUs that this process may use.
fn cpus() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// The settings of a worker.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// The GGUF file.
    pub model: PathBuf,
    /// What it is for.
    pub role: WorkerRole,
    /// The name that clients ask for; absent is the file's name without `.gguf`.
    pub name: Option<String>,
    /// Where it listens.
    pub listen: ListenConfig,
    /// Tells the routers of this worker.
    pub membership: Arc<dyn Membership>,
    /// The name of its group; absent is the address that others reach it at.
    pub group: Option<String>,
    /// Where others reach it; absent is the address that it listens on.
    pub advertise: Option<Endpoint>,
    /// What runs the model.
    pub backend: BackendKind,
    /// Instruction set of the `cpu` backend; absent is the best of the machine.
    pub isa: Option<Isa>,
    /// How the `cpu` backend computes prompts; absent is what suits its instruction set.
    pub prompts: Option<PromptPrecision>,
    /// Ranks that share the model; absent is the worker alone.
    pub tensor_parallel: Option<GroupConfig>,
    /// Threads that compute, of each rank; absent is an equal share of the CPUs.
    pub threads: Option<NonZeroUsize>,
    /// What the `cpu` backend keeps keys and values as; absent is what is best.
    pub kv_type: Option<KvType>,
    /// Bytes of the KV pool; absent is a quarter of the memory that is available, between
    /// one full context and 1 GiB.
    pub kv_bytes: Option<u64>,
    /// Longest prompt + output, in tokens; absent, or beyond the model's, is the model's.
    pub context: Option<usize>,
    /// The scheduler's settings.
    pub engine: EngineConfig,
    /// Most open sessions. At least 1.
    pub max_sessions: usize,
    /// Bytes that a session may leave unread before it is closed. At least 64 KiB.
    pub session_backlog: usize,
    /// Most bytes of the texts that draft.
    pub corpus_bytes: usize,
    /// How long a text drafts.
    pub corpus_ttl: Duration,
    /// For running sequences after a signal; then they end as preempted.
    pub drain: Duration,
}

impl WorkerConfig {
    /// Defaults for everything but the file and the listener.
    pub fn new(model: PathBuf, listen: ListenConfig) -> Self {
        Self {
            model,
            role: WorkerRole::default(),
            name: None,
            listen,
            membership: Arc::new(Static::new([])),
            group: None,
            advertise: None,
            backend: BackendKind::default(),
            isa: None,
            prompts: None,
            tensor_parallel: None,
            threads: None,
            kv_type: None,
            kv_bytes: None,
            context: None,
            engine: EngineConfig::default(),
            max_sessions: 256,
            session_backlog: 64 << 20,
            corpus_bytes: 64 << 20,
            corpus_ttl: Duration::from_secs(24 * 3600),
            drain: Duration::from_secs(30),
        }
    }

    /// Checks what can be checked without the model.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        for (name, value, least) in [
            ("max_sessions", self.max_sessions, 1),
            ("session_backlog", self.session_backlog, 64 << 10),
            ("context", self.context.unwrap_or(usize::MAX), PAGE_TOKENS),
        ] {
            if value < least {
                return Err(ConfigError::Least { name, least });
            }
        }
        if let Some(group) = self.group.as_ref().filter(|group| !Member::is_name(group)) {
            return Err(ConfigError::Group {
                given: group.clone(),
            });
        }
        if let Some(group) = &self.tensor_parallel {
            let (name, least) = ("tensor_parallel", 2);
            if group.ranks < least {
                return Err(ConfigError::Least { name, least });
            }
            if self.backend != BackendKind::Cpu {
                return Err(ConfigError::GroupBackend);
            }
        }
        let other = self.kv_type.filter(|&kv| kv != KvType::Bf16);
        if let Some(kv) = other.filter(|_| self.backend != BackendKind::Cpu) {
            return Err(ConfigError::KvBackend { kv });
        }
        if let Some(isa) = self.isa.filter(|isa| !isa.is_available()) {
            return Err(ConfigError::IsaMissing { isa });
        }
        Ok(())
    }

    /// Ranks on this machine, the worker itself included.
    fn ranks_here(&self) -> usize {
        match &self.tensor_parallel {
            Some(GroupConfig {
                ranks,
                others: Others::Local(_),
                ..
            }) => *ranks,
            _ => 1,
        }
    }

    /// Machines whose memory the model shares.
    pub(crate) fn machines(&self) -> usize {
        let ranks = self.tensor_parallel.as_ref().map_or(1, |group| group.ranks);
        ranks / self.ranks_here()
    }

    /// What the `cpu` backend keeps keys and values as.
    pub(crate) fn kv(&self) -> KvType {
        self.kv_type.unwrap_or_default()
    }

    /// The instruction set of the `cpu` backend, and how it computes prompts.
    pub(crate) fn kernels(&self) -> (Isa, PromptPrecision) {
        let isa = self.isa.unwrap_or_else(Isa::detect);
        (isa, self.prompts.unwrap_or(PromptPrecision::best(isa)))
    }

    /// Threads of each rank.
    pub(crate) fn rank_threads(&self) -> usize {
        let share = || cpus() / self.ranks_here();
        self.threads.map_or_else(share, usize::from).max(1)
    }

    /// The served name.
    pub(crate) fn served_name(&self) -> Result<String, ConfigError> {
        let stem = || Some(self.model.file_stem()?.to_string_lossy().into_owned());
        self.name
            .clone()
            .or_else(stem)
            .filter(|name| !name.is_empty())
            .ok_or(ConfigError::Name)
    }
}

/// A setting that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A number is too small.
    #[error("{name} must be at least {least}")]
    Least {
        /// Which.
        name: &'static str,
        /// Its least value.
        least: usize,
    },
    /// Not a backend.
    #[error("the backend is cpu or candle, not {given:?}")]
    Backend {
        /// What was given.
        given: String,
    },
    /// Nothing that a worker is for.
    #[error("a worker's role is serve or draft, not {given:?}")]
    Role {
        /// What was given.
        given: String,
    },
    /// Not an instruction set.
    #[error("the instruction set is scalar, neon, avx2, avx512 or avx512bf16, not {given:?}")]
    Isa {
        /// What was given.
        given: String,
    },
    /// Not a way to compute prompts.
    #[error("prompts are computed in int8, bf16 or bf16-tiles, not {given:?}")]
    Prompts {
        /// What was given.
        given: String,
    },
    /// Nothing that keys and values can be kept as.
    #[error("keys and values are int16, bf16 or int8, not {given:?}")]
    KvType {
        /// What was given.
        given: String,
    },
    /// Nothing that parts of sums can be rounded to.
    #[error("ranks exchange f32, bf16 or int8, not {given:?}")]
    Payload {
        /// What was given.
        given: String,
    },
    /// Not one of the ranks that join.
    #[error("rank {rank} of {world} cannot join: a rank from 1 to {} can", world - 1)]
    Rank {
        /// Which.
        rank: usize,
        /// Ranks of its group.
        world: usize,
    },
    /// Only one backend can keep them so.
    #[error("keys and values in {} need the cpu backend", kv.name())]
    KvBackend {
        /// What they were to be kept as.
        kv: KvType,
    },
    /// This machine cannot run it.
    #[error("this machine has no {isa:?}")]
    IsaMissing {
        /// Which.
        isa: Isa,
    },
    /// Not a group's name.
    #[error("a group's name has letters, digits and -_.:[] only, unlike {given:?}")]
    Group {
        /// What was given.
        given: String,
    },
    /// Only one backend can be split.
    #[error("tensor parallelism needs the cpu backend")]
    GroupBackend,
    /// The path of the model gives no name, and none was set.
    #[error("the model has no name")]
    Name,
}

impl ConfigError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

#[cfg(test)]
mod tests {
    use shoal_fabric::net::{Limits, Network};

    use super::*;
    use crate::group::RankCommand;

    fn config() -> WorkerConfig {
        let listen = ListenConfig {
            network: Network::Tcp,
            address: ([127, 0, 0, 1], 0).into(),
            tls: None,
            limits: Limits::default(),
        };
        WorkerConfig::new("models/tiny.Q4_1.gguf".into(), listen)
    }

    #[test]
    fn the_name_is_the_file_s_unless_set() {
        assert_eq!(config().served_name().unwrap(), "tiny.Q4_1");
        let mut config = config();
        config.name = Some("mine".into());
        assert_eq!(config.served_name().unwrap(), "mine");
        config.name = Some(String::new());
        assert_eq!(config.served_name(), Err(ConfigError::Name));
    }

    #[test]
    fn every_least_value_holds() {
        assert_eq!(config().validate(), Ok(()));
        for (spoil, name) in [
            (
                (|c: &mut WorkerConfig| c.max_sessions = 0) as fn(&mut WorkerConfig),
                "max_sessions",
            ),
            (|c| c.session_backlog = 1, "session_backlog"),
            (|c| c.context = Some(31), "context"),
            (|c| c.group = Some("a/b".into()), "a group's name"),
        ] {
            let mut config = config();
            spoil(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    fn a_group_has_two_ranks_and_the_backend_that_can_be_split() {
        let group = |ranks| {
            Some(GroupConfig {
                ranks,
                others: Others::Local(RankCommand {
                    program: "shoal".into(),
                    arguments: Vec::new(),
                }),
                patience: Duration::from_secs(1),
            })
        };
        let mut config = config();
        config.tensor_parallel = group(1);
        assert!(matches!(
            config.validate(),
            Err(ConfigError::Least { least: 2, .. })
        ));
        config.tensor_parallel = group(2);
        assert_eq!(config.validate(), Ok(()));
        config.backend = BackendKind::Candle;
        assert_eq!(config.validate(), Err(ConfigError::GroupBackend));
    }

    #[test]
    fn types_of_keys_and_values_need_the_backend_that_has_them() {
        let mut config = config();
        config.kv_type = Some(KvType::Int8);
        assert_eq!(config.validate(), Ok(()));
        config.backend = BackendKind::Candle;
        let kv = KvType::Int8;
        assert_eq!(config.validate(), Err(ConfigError::KvBackend { kv }));
    }

    #[test]
    fn names_parse() {
        for kind in [BackendKind::Cpu, BackendKind::Candle] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("cuda".parse::<BackendKind>().is_err());
        for isa in Isa::ALL {
            assert_eq!(parse_isa(isa_name(isa)), Ok(isa));
        }
        assert!(parse_isa("AVX2").is_err());
        for kv in KvType::ALL {
            assert_eq!(parse_kv_type(kv.name()), Ok(kv));
        }
        assert!(parse_kv_type("int4").is_err());
    }
}
