//! Who is in the cluster, by one trait: a list from the configuration ([`Static`]), the
//! processes of one supervisor ([`Local`]), or records in etcd ([`Etcd`]).

mod endpoint;
mod etcd;
mod fixed;
mod record;

use std::{fmt, sync::Arc, time::Duration};

use futures::future::{BoxFuture, FutureExt};
use shoal_core::Class;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::sidecar::Sidecar;

pub use endpoint::{Endpoint, EndpointError};
pub use etcd::{Etcd, EtcdConfig, Login};
pub use fixed::{Local, Static};
pub use record::{Capabilities, Intent, Member, Role, State, View};

/// Most that the withdrawal of a record may hold a process's end up.
const WITHDRAWAL: Duration = Duration::from_secs(2);

/// How the processes of a cluster find each other.
///
/// Losing the membership service is no outage: a view stays as it was last known, and a
/// process that was forgotten registers again and keeps serving meanwhile.
pub trait Membership: fmt::Debug + Send + Sync {
    /// The members, and a wake-up for each change. The sender may be gone: the view is final
    /// then.
    fn watch(&self) -> watch::Receiver<Arc<View>>;

    /// Makes `own` known to the others, as it is now and whenever it changes, until the
    /// registration ends.
    fn register(&self, own: watch::Receiver<Member>) -> Registration {
        drop(own);
        Registration::default()
    }

    /// An epoch for the next start of a group: at least `least`, and more than any that the
    /// group had before, as far as the membership knows.
    fn next_epoch<'a>(&'a self, group: &'a str, least: u64) -> BoxFuture<'a, u64> {
        let _ = group;
        std::future::ready(least).boxed()
    }
}

/// A process's record, for as long as it stands.
#[derive(Debug)]
pub struct Registration {
    intent: watch::Receiver<Option<Intent>>,
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    stop: CancellationToken,
    task: JoinHandle<()>,
    /// The task is on it.
    _thread: Arc<Sidecar>,
}

/// Nobody is told and nothing is asked.
impl Default for Registration {
    fn default() -> Self {
        Self {
            intent: watch::channel(None).1,
            kept: None,
        }
    }
}

impl Registration {
    /// What operators want of this group, as last known.
    pub fn intent(&self) -> watch::Receiver<Option<Intent>> {
        self.intent.clone()
    }

    /// Withdraws the record, where that can be done in a short time.
    pub async fn end(self) {
        let Some(kept) = self.kept else {
            return;
        };
        kept.stop.cancel();
        if tokio::time::timeout(WITHDRAWAL, kept.task).await.is_err() {
            tracing::warn!("the membership record is left to expire");
        }
    }
}

/// A membership that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// Not a way to find the cluster.
    #[error("{given:?} is no membership: static:HOST:PORT,… or etcd://HOST:PORT,…/CLUSTER")]
    Source {
        /// What was given.
        given: String,
    },
    /// Not an endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// etcd without a member.
    #[error("etcd needs at least one endpoint")]
    NoEndpoint,
    /// Records would expire between two renewals.
    #[error("the TTL of membership records must be at least 2 s")]
    Ttl,
    /// A TLS file is wrong.
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    /// The operating system gave no thread.
    #[error("cannot start the membership thread")]
    Thread(#[source] std::io::Error),
}

impl MembershipError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Source { .. } | Self::Endpoint(_) | Self::NoEndpoint | Self::Ttl => Class::Client,
            Self::Tls(error) => error.class(),
            Self::Thread(_) => Class::Fatal,
        }
    }
}

/// Where the cluster is found, as `--membership` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `static:HOST:PORT,…`: these workers.
    Static(Vec<Endpoint>),
    /// `etcd://HOST:PORT,…/CLUSTER`.
    Etcd {
        /// Members of the etcd cluster; any one will do.
        endpoints: Vec<Endpoint>,
        /// The name of the Shoal cluster there.
        cluster: String,
    },
}

impl std::str::FromStr for Source {
    type Err = MembershipError;

    fn from_str(text: &str) -> Result<Self, MembershipError> {
        let wrong = || MembershipError::Source { given: text.into() };
        let endpoints = |list: &str| -> Result<Vec<Endpoint>, EndpointError> {
            list.split(',').map(str::parse).collect()
        };
        if let Some(list) = text.strip_prefix("static:") {
            return Ok(Self::Static(endpoints(list)?));
        }
        let rest = text.strip_prefix("etcd://").ok_or_else(wrong)?;
        let (list, cluster) = rest.split_once('/').ok_or_else(wrong)?;
        let fit = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if cluster.is_empty() || !cluster.chars().all(fit) {
            return Err(wrong());
        }
        Ok(Self::Etcd {
            endpoints: endpoints(list)?,
            cluster: cluster.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_parse() {
        let list = |list: &[&str]| -> Vec<Endpoint> {
            list.iter().map(|text| text.parse().unwrap()).collect()
        };
        let parse = |text: &str| text.parse::<Source>();
        let two = list(&["a:1", "[::1]:2"]);
        assert_eq!(
            parse("static:a:1,[::1]:2").unwrap(),
            Source::Static(two.clone())
        );
        let etcd = Source::Etcd {
            endpoints: two,
            cluster: "prod-1".into(),
        };
        assert_eq!(parse("etcd://a:1,[::1]:2/prod-1").unwrap(), etcd);
        for bad in [
            "",
            "a:1",
            "static:",
            "static:a",
            "etcd://a:1",
            "etcd://a:1/",
            "etcd://a:1/x/y",
            "etcd:///x",
            "consul://a:1/x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
