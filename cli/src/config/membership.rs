//! `[membership]`: how the processes of a cluster find each other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_fabric::membership::{Etcd, EtcdConfig, Login, Membership, Source, Static};
use shoal_fabric::net::Network;

use super::values::Time;
use super::{ConfigError, Section, tls};

/// How long a record outlives its process, unless set.
const TTL: Duration = Duration::from_secs(15);

/// Membership.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Membership")]
pub(crate) struct MembershipSettings {
    /// How the cluster is found: static:HOST:PORT,… names the workers to a router;
    /// etcd://HOST:PORT,…/CLUSTER is where all meet
    #[arg(
        long = "membership",
        env = "SHOAL_MEMBERSHIP_SOURCE",
        value_name = "SOURCE"
    )]
    pub(crate) source: Option<String>,

    /// How long the record of a process that died stays in etcd [default: 15s]
    #[arg(
        long = "membership-ttl",
        env = "SHOAL_MEMBERSHIP_TTL",
        value_name = "TIME"
    )]
    pub(crate) ttl: Option<Time>,

    /// User of etcd
    #[arg(
        long = "membership-user",
        env = "SHOAL_MEMBERSHIP_USER",
        value_name = "NAME"
    )]
    pub(crate) user: Option<String>,

    /// Password of that user
    #[arg(
        long = "membership-password",
        env = "SHOAL_MEMBERSHIP_PASSWORD",
        value_name = "PASSWORD",
        hide_env_values = true
    )]
    pub(crate) password: Option<String>,

    /// Authority (PEM) of etcd's certificates; plain text to etcd without it
    #[arg(
        long = "membership-ca",
        env = "SHOAL_MEMBERSHIP_CA",
        value_name = "FILE"
    )]
    pub(crate) ca: Option<PathBuf>,

    /// Certificate (PEM) to show to etcd
    #[arg(
        long = "membership-cert",
        env = "SHOAL_MEMBERSHIP_CERT",
        value_name = "FILE"
    )]
    pub(crate) cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(
        long = "membership-key",
        env = "SHOAL_MEMBERSHIP_KEY",
        value_name = "FILE"
    )]
    pub(crate) key: Option<PathBuf>,

    /// Name that etcd's certificates must hold [default: the host it is reached at]
    #[arg(
        long = "membership-domain",
        env = "SHOAL_MEMBERSHIP_DOMAIN",
        value_name = "NAME"
    )]
    pub(crate) domain: Option<String>,
}

impl Section for MembershipSettings {
    const NAME: &'static str = "membership";
}

impl MembershipSettings {
    /// The membership, started, for a process of `section` that listens at `listen`; `None` where
    /// no source is set.
    pub(crate) fn start(
        self,
        section: &'static str,
        listen: SocketAddr,
        advertised: bool,
    ) -> Result<Option<Arc<dyn Membership>>, ConfigError> {
        let login = match (self.user, self.password) {
            (Some(user), Some(password)) => Some(Login { user, password }),
            (None, None) => None,
            _ => {
                return Err(ConfigError::Incomplete {
                    section: "membership",
                    expected: "user and password together",
                });
            }
        };
        let expected = "ca for TLS to etcd, and cert and key together";
        let tls = tls::client(
            "membership",
            expected,
            self.ca,
            self.cert,
            self.key,
            self.domain,
        )?;
        let Some(source) = self.source else {
            return Ok(None);
        };
        Ok(Some(match source.parse()? {
            Source::Static(workers) => Arc::new(Static::new(workers)),
            Source::Etcd { .. } if listen.ip().is_unspecified() && !advertised => {
                return Err(ConfigError::Unreachable { section, listen });
            }
            Source::Etcd { endpoints, cluster } => Arc::new(Etcd::start(EtcdConfig {
                endpoints,
                network: Network::default(),
                cluster,
                login,
                tls,
                ttl: self.ttl.map_or(TTL, |time| time.0),
            })?),
        }))
    }
}
