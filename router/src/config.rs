//! The settings of a router.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use shoal_draft::LedgerConfig;
use shoal_fabric::{
    membership::{Endpoint, Member, Membership, Static},
    net::{ClientConfig, Limits, ListenConfig, Network},
    tls::{ClientTls, ServerTls},
};

use crate::{
    admission, cluster::LinkConfig, error::RouterError, keys::ApiKeys, peers::PeerConfig,
    placement::Routing,
};

/// The settings as a user gives them.
#[derive(Clone, Debug)]
pub struct RouterArgs {
    /// What its connections are made of, those of clients and those to workers.
    pub network: Network,
    /// Serves the OpenAI HTTP API and gRPC; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Plain text without it.
    pub tls: Option<ServerTls>,
    /// The workers, each `host:port`.
    pub workers: Vec<String>,
    /// Tells who the workers are, in the place of `workers`.
    pub membership: Option<Arc<dyn Membership>>,
    /// Where others reach it; absent is the address that it listens on.
    pub advertise: Option<Endpoint>,
    /// Its name among the routers; absent is that address.
    pub name: Option<String>,
    /// TLS towards the workers; plain text without it.
    pub worker_tls: Option<ClientTls>,
    /// Other routers, each `host:port`, besides those that the membership tells of; this router
    /// may be among them.
    pub peers: Vec<String>,
    /// The API key to show to them: one with `router = true`.
    pub peer_key: Option<String>,
    /// TLS towards them; plain text without it.
    pub peer_tls: Option<ClientTls>,
    /// TOML file of hashed API keys (see [`ApiKeys`]); without it every caller is tenant
    /// `default`.
    pub api_keys: Option<PathBuf>,
    /// Most sequences at the workers at one time, besides those that were lost and go on.
    pub max_running: u32,
    /// Most requests that wait for that; further ones are refused.
    pub max_waiting: u32,
    /// Largest body of a request.
    pub max_body_bytes: usize,
    /// Deadline of a request that brings none, and the longest one it may bring.
    pub request_timeout: Duration,
    /// Output tokens of a request that sets no limit. Without it, as many as the context
    /// holds (16 for `/v1/completions`, as OpenAI does).
    pub default_max_tokens: Option<u32>,
    /// How long a request waits for a worker where none takes it: one that was just sent, and one
    /// whose worker was lost.
    pub resume_window: Duration,
    /// For open answers after the shutdown's start; then they end with an error.
    pub drain: Duration,
    /// What answers draft for, and for how long.
    pub corpus: LedgerConfig,
    /// How the worker of a sequence is chosen.
    pub routing: Routing,
    /// A worker that says nothing for so long gets nothing new, and its sequences move.
    pub worker_silence: Duration,
    /// The same for one with work that finishes no step for so long, and for four times what
    /// it predicts for the step.
    pub worker_stall: Duration,
}

impl Default for RouterArgs {
    fn default() -> Self {
        Self {
            network: Network::default(),
            listen: ([127, 0, 0, 1], 8080).into(),
            tls: None,
            workers: Vec::new(),
            membership: None,
            advertise: None,
            name: None,
            worker_tls: None,
            peers: Vec::new(),
            peer_key: None,
            peer_tls: None,
            api_keys: None,
            max_running: 256,
            max_waiting: 1024,
            max_body_bytes: 8 << 20,
            request_timeout: Duration::from_secs(600),
            default_max_tokens: None,
            resume_window: Duration::from_secs(30),
            drain: Duration::from_secs(30),
            corpus: LedgerConfig::default(),
            routing: Routing::default(),
            worker_silence: Duration::from_millis(400),
            worker_stall: Duration::from_millis(400),
        }
    }
}

/// The settings, validated.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    pub(crate) listen: ListenConfig,
    pub(crate) membership: Arc<dyn Membership>,
    pub(crate) advertise: Option<Endpoint>,
    pub(crate) name: Option<String>,
    pub(crate) link: LinkConfig,
    pub(crate) routing: Routing,
    pub(crate) keys: Option<ApiKeys>,
    pub(crate) admission: admission::Limits,
    pub(crate) max_body_bytes: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) default_max_tokens: Option<u32>,
    pub(crate) resume_window: Duration,
    pub(crate) drain: Duration,
    pub(crate) corpus: LedgerConfig,
    pub(crate) peers: PeerConfig,
}

/// For clients to read the ends of their answers once there is nothing more to come.
const LAST_READS: Duration = Duration::from_secs(5);
/// For a connection to a worker or another router: short, so that one that is back is found soon.
const PEER_CONNECT: Duration = Duration::from_secs(2);

impl TryFrom<RouterArgs> for RouterConfig {
    type Error = RouterError;

    fn try_from(args: RouterArgs) -> Result<Self, RouterError> {
        let check = |holds: bool, setting, expected| {
            holds
                .then_some(())
                .ok_or(RouterError::Setting { setting, expected })
        };
        let known = args.membership.is_some() || !args.workers.is_empty();
        check(known, "workers", "at least one")?;
        check(args.max_running > 0, "max_running", "at least 1")?;
        check(
            args.max_body_bytes >= 1024,
            "max_body_bytes",
            "at least 1024",
        )?;
        check(
            args.default_max_tokens != Some(0),
            "default_max_tokens",
            "at least 1",
        )?;
        check(
            (1..=LedgerConfig::MOST_USERS).contains(&args.corpus.users),
            "corpus_users",
            "in [1, 4]",
        )?;
        for (setting, time) in [
            ("corpus_ttl", args.corpus.ttl),
            ("request_timeout", args.request_timeout),
            ("worker_silence", args.worker_silence),
            ("worker_stall", args.worker_stall),
        ] {
            check(
                time >= Duration::from_millis(100),
                setting,
                "at least 100 ms",
            )?;
        }
        check(
            args.name.as_deref().is_none_or(Member::is_name),
            "name",
            "of letters, digits and -_.:[]",
        )?;
        let authorization = args.peer_key.map(|key| format!("Bearer {key}").parse());
        let authorization = authorization
            .transpose()
            .map_err(|_| RouterError::Setting {
                setting: "peer_key",
                expected: "of visible ASCII characters",
            })?;
        let peers: Result<Vec<Endpoint>, _> = args.peers.iter().map(|p| p.parse()).collect();
        let workers: Result<Vec<Endpoint>, _> = args.workers.iter().map(|w| w.parse()).collect();
        let workers = Static::new(workers?);
        Ok(Self {
            listen: ListenConfig {
                network: args.network.clone(),
                address: args.listen,
                tls: args.tls,
                limits: Limits {
                    drain: LAST_READS,
                    ..Limits::default()
                },
            },
            membership: args.membership.unwrap_or(Arc::new(workers)),
            advertise: args.advertise,
            name: args.name,
            link: LinkConfig {
                client: ClientConfig {
                    network: args.network,
                    tls: args.worker_tls,
                    connect_timeout: PEER_CONNECT,
                    ..ClientConfig::default()
                },
                silence: args.worker_silence,
                stall: args.worker_stall,
            },
            peers: PeerConfig {
                client: ClientConfig {
                    tls: args.peer_tls,
                    connect_timeout: PEER_CONNECT,
                    ..ClientConfig::default()
                },
                authorization,
                addresses: peers?,
            },
            routing: args.routing,
            keys: args.api_keys.as_deref().map(ApiKeys::load).transpose()?,
            admission: admission::Limits {
                max_running: args.max_running,
                max_waiting: args.max_waiting,
            },
            max_body_bytes: args.max_body_bytes,
            request_timeout: args.request_timeout,
            default_max_tokens: args.default_max_tokens,
            resume_window: args.resume_window,
            drain: args.drain,
            corpus: args.corpus,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> RouterArgs {
        RouterArgs {
            workers: vec!["127.0.0.1:9090".into()],
            ..RouterArgs::default()
        }
    }

    #[test]
    fn defaults_need_a_worker_only() {
        assert!(RouterConfig::try_from(args()).is_ok());
        let error = RouterConfig::try_from(RouterArgs::default()).unwrap_err();
        assert_eq!(error.to_string(), "workers must be at least one");
    }

    #[test]
    fn settings_are_checked() {
        for (bad, name) in [
            (
                RouterArgs {
                    max_running: 0,
                    ..args()
                },
                "max_running",
            ),
            (
                RouterArgs {
                    name: Some("a/b".into()),
                    ..args()
                },
                "name",
            ),
            (
                RouterArgs {
                    max_body_bytes: 10,
                    ..args()
                },
                "max_body_bytes",
            ),
            (
                RouterArgs {
                    default_max_tokens: Some(0),
                    ..args()
                },
                "default_max_tokens",
            ),
            (
                RouterArgs {
                    worker_stall: Duration::ZERO,
                    ..args()
                },
                "worker_stall",
            ),
            (
                RouterArgs {
                    corpus: LedgerConfig {
                        users: 0,
                        ..LedgerConfig::default()
                    },
                    ..args()
                },
                "corpus_users",
            ),
            (
                RouterArgs {
                    workers: vec!["nowhere".into()],
                    ..args()
                },
                "workers",
            ),
            (
                RouterArgs {
                    peers: vec!["nowhere".into()],
                    ..args()
                },
                "addresses",
            ),
            (
                RouterArgs {
                    peer_key: Some("\n".into()),
                    ..args()
                },
                "peer_key",
            ),
            (
                RouterArgs {
                    api_keys: Some("/does/not/exist".into()),
                    ..args()
                },
                "/does/not/exist",
            ),
        ] {
            let error = RouterConfig::try_from(bad).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
