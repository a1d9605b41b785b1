//! Who is in the cluster.

use std::{fmt, str::FromStr, sync::Arc};

use http::uri::Authority;
use shoal_core::Class;
use tokio::sync::watch;

/// Where a worker listens: `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    authority: Authority,
    port: u16,
}

impl Endpoint {
    /// Name or address, IPv6 without its brackets.
    pub fn host(&self) -> &str {
        let host = self.authority.host();
        host.strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host)
    }

    /// Never 0.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.authority.fmt(f)
    }
}

/// Not an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no endpoint: host:port is expected")]
pub struct EndpointError {
    given: String,
}

impl EndpointError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let authority: Authority = s.parse().ok()?;
            let port = authority.port_u16().filter(|&port| port != 0)?;
            let sound = !authority.host().is_empty() && !s.contains('@');
            sound.then_some(Self { authority, port })
        };
        parse().ok_or_else(|| EndpointError { given: s.into() })
    }
}

/// The workers that a router may use, now and whenever they change.
pub trait Membership: fmt::Debug + Send + Sync {
    /// The current list, and a wake-up for each new one. The sender may be gone: the list is
    /// final then.
    fn watch(&self) -> watch::Receiver<Arc<Vec<Endpoint>>>;
}

/// A list from the configuration; it never changes.
#[derive(Clone, Debug)]
pub struct StaticMembership(watch::Receiver<Arc<Vec<Endpoint>>>);

impl StaticMembership {
    /// These workers, duplicates left out.
    pub fn new(endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        let mut list: Vec<Endpoint> = Vec::new();
        for endpoint in endpoints {
            if !list.contains(&endpoint) {
                list.push(endpoint);
            }
        }
        Self(watch::channel(Arc::new(list)).1)
    }
}

impl Membership for StaticMembership {
    fn watch(&self) -> watch::Receiver<Arc<Vec<Endpoint>>> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked() {
        for good in ["127.0.0.1:9090", "worker-0.shoal:1", "[::1]:9090"] {
            assert_eq!(good.parse::<Endpoint>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "host",
            "host:",
            ":80",
            "host:0",
            "host:99999",
            "a@host:1",
            "http://h:1",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
        assert_eq!("[::1]:9".parse::<Endpoint>().unwrap().host(), "::1");
    }

    #[test]
    fn a_static_list_has_no_duplicates() {
        let list = ["a:1", "b:1", "a:1"].map(|e| e.parse().unwrap());
        let members = StaticMembership::new(list).watch();
        let members: Vec<String> = members.borrow().iter().map(|e| e.to_string()).collect();
        assert_eq!(members, ["a:1", "b:1"]);
    }
}
