//! Membership by records in etcd, under `/shoal/v1/<cluster>/`:
//!
//! ```text
//! instances/<model>/<group>   leased   a worker's [`Member`]
//! routers/<router>            leased   a router's [`Member`]
//! groups/<group>/epoch                 the last epoch of a group, a decimal number
//! intent/<group>                       what operators want of a group: an [`Intent`]
//! ```
//!
//! Values are JSON. All traffic runs on a thread of its own, so that a lease lives however
//! busy the process is.

mod client;
mod follow;
mod register;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::{BoxFuture, FutureExt};
use tokio::{runtime::Handle, sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    Endpoint, Intent, Kept, Member, Membership, MembershipError, Registration, Role, View,
    etcd::client::{Client, Range},
};
use crate::{backoff::Backoff, net::Network, sidecar::Sidecar, tls::ClientTls};

/// Most that a new epoch may hold a start up.
const EPOCH_PATIENCE: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// Where etcd is, and how to speak to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Members of the etcd cluster, at least one; any one will do.
    pub endpoints: Vec<Endpoint>,
    /// What connections to them are made of.
    pub network: Network,
    /// The name of the Shoal cluster there.
    pub cluster: String,
    /// Where etcd asks for authentication.
    pub login: Option<Login>,
    /// Plain text without it.
    pub tls: Option<ClientTls>,
    /// How long a record outlives its process. At least 2 s; in whole seconds.
    pub ttl: Duration,
}

/// A user of etcd.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// Its name.
    pub user: String,
    /// Its password.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Etcd {
    shared: Arc<Shared>,
    thread: Arc<Sidecar>,
    view: OnceLock<watch::Receiver<Arc<View>>>,
}

/// What every connection needs.
#[derive(Debug)]
struct Shared {
    config: EtcdConfig,
    root: String,
    /// Whose turn it is to be connected to.
    next: AtomicUsize,
}

impl Shared {
    /// The next member of the etcd cluster in turn.
    fn endpoint(&self) -> &Endpoint {
        let endpoints = &self.config.endpoints;
        &endpoints[self.next.fetch_add(1, Ordering::Relaxed) % endpoints.len()]
    }

    fn key(&self, path: std::fmt::Arguments<'_>) -> Vec<u8> {
        format!("{}{path}", self.root).into()
    }

    fn record_key(&self, own: &Member) -> Vec<u8> {
        match own.role {
            Role::Worker | Role::Draft => {
                self.key(format_args!("instances/{}/{}", own.model, own.name))
            }
            Role::Router => self.key(format_args!("routers/{}", own.name)),
        }
    }
}

fn backoff() -> Backoff {
    Backoff::new(FIRST_PAUSE, LONGEST_PAUSE)
}

impl Etcd {
    /// Starts the thread. Whether etcd is there shows later: it may come and go.
    ///
    /// # Errors
    /// When a setting is out of range, a TLS file is wrong, or there is no thread to be had.
    pub fn start(config: EtcdConfig) -> Result<Self, MembershipError> {
        let thread = || Sidecar::start("membership").map_err(MembershipError::Thread);
        Self::with(config, thread)
    }

    /// [`start`](Self::start) on a runtime that there is already, in the place of a thread.
    ///
    /// # Errors
    /// When a setting is out of range, or a TLS file is wrong.
    pub fn on(runtime: Handle, config: EtcdConfig) -> Result<Self, MembershipError> {
        Self::with(config, || Ok(Sidecar::on(runtime)))
    }

    fn with(
        config: EtcdConfig,
        thread: impl FnOnce() -> Result<Sidecar, MembershipError>,
    ) -> Result<Self, MembershipError> {
        if config.endpoints.is_empty() {
            return Err(MembershipError::NoEndpoint);
        }
        if config.ttl < Duration::from_secs(2) {
            return Err(MembershipError::Ttl);
        }
        if let Some(tls) = &config.tls {
            tls.config()?;
        }
        let thread = thread()?;
        let next = rand::random_range(0..config.endpoints.len());
        Ok(Self {
            shared: Arc::new(Shared {
                root: format!("/shoal/v1/{}/", config.cluster),
                config,
                next: AtomicUsize::new(next),
            }),
            thread: Arc::new(thread),
            view: OnceLock::new(),
        })
    }
}

impl Membership for Etcd {
    fn watch(&self) -> watch::Receiver<Arc<View>> {
        let start = || {
            let (sender, receiver) = watch::channel(Arc::default());
            let root = self.shared.root.clone();
            let publish = move |entries: &follow::Entries| {
                let view = follow::view(entries, &root);
                sender.send_if_modified(|known: &mut Arc<View>| {
                    let news = **known != view;
                    if news {
                        *known = Arc::new(view);
                    }
                    news
                });
            };
            let range = Range::prefix(self.shared.root.clone().into());
            let follow = follow::follow(self.shared.clone(), range, publish);
            self.thread.handle().spawn(follow);
            receiver
        };
        self.view.get_or_init(start).clone()
    }

    fn register(&self, own: watch::Receiver<Member>) -> Registration {
        let (sender, intent) = watch::channel(None);
        let stop = CancellationToken::new();
        let (role, name) = {
            let own = own.borrow();
            (own.role, own.name.clone())
        };
        if role != Role::Router {
            let range = Range::key(self.shared.key(format_args!("intent/{name}")));
            let follow = follow::follow(self.shared.clone(), range, move |entries| {
                let intent = follow::intent(entries);
                sender.send_if_modified(|known: &mut Option<Intent>| {
                    std::mem::replace(known, intent) != intent
                });
            });
            let follow = stop.clone().run_until_cancelled_owned(follow);
            self.thread.handle().spawn(follow);
        }
        let keep = register::keep(self.shared.clone(), own, stop.clone());
        let task = self.thread.handle().spawn(keep);
        Registration {
            intent,
            kept: Some(Kept {
                stop,
                task,
                _thread: self.thread.clone(),
            }),
        }
    }

    fn next_epoch<'a>(&'a self, group: &'a str, least: u64) -> BoxFuture<'a, u64> {
        let shared = self.shared.clone();
        let key = shared.key(format_args!("groups/{group}/epoch"));
        let raise = async move {
            let mut client = Client::connect(&shared).await?;
            client.raise(&key, least).await
        };
        // There, for the connection is served there.
        let raise = self.thread.handle().spawn(timeout(EPOCH_PATIENCE, raise));
        async move {
            let problem = match raise.await {
                Ok(Ok(Ok(epoch))) => return epoch,
                Ok(Ok(Err(error))) => error.to_string(),
                Ok(Err(elapsed)) => elapsed.to_string(),
                Err(broken) => broken.to_string(),
            };
            tracing::warn!(group, problem, "the epoch is not agreed upon with etcd");
            least
        }
        .boxed()
    }
}
