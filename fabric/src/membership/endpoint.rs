use std::{fmt, net::SocketAddr, str::FromStr};

use http::uri::Authority;
use serde::{Deserialize, Serialize};
use shoal_core::Class;

/// Where a process listens: `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl TryFrom<SocketAddr> for Endpoint {
    type Error = EndpointError;

    fn try_from(address: SocketAddr) -> Result<Self, EndpointError> {
        address.to_string().parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
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
}
