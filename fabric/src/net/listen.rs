use std::{io, net::SocketAddr, time::Duration};

use tokio_rustls::TlsAcceptor;

use super::{
    NetError, Network,
    network::{Connection, Socket},
};
use crate::tls::ServerTls;

/// Where and how a process listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenConfig {
    /// What its connections are made of.
    pub network: Network,
    /// Port 0 takes a free one.
    pub address: SocketAddr,
    /// Plain text without it.
    pub tls: Option<ServerTls>,
    /// What clients may cost.
    pub limits: Limits,
}

/// What the clients of a listener may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time; further ones are closed at once.
    pub max_connections: usize,
    /// Streams of one HTTP/2 connection at one time.
    pub max_streams: u32,
    /// For the TLS handshake, for the choice of protocol, and for each request's head.
    pub header_timeout: Duration,
    /// Bytes of a request's head. At least 8 KiB.
    pub max_header_bytes: u32,
    /// Between HTTP/2 pings to a silent client.
    pub keepalive_interval: Duration,
    /// For the answer to such a ping.
    pub keepalive_timeout: Duration,
    /// For open requests at the end; then they are cut off.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_streams: 1024,
            header_timeout: Duration::from_secs(30),
            max_header_bytes: 64 << 10,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            drain: Duration::from_secs(30),
        }
    }
}

impl Limits {
    fn validate(&self) -> Result<(), NetError> {
        for (name, value, least) in [
            ("max_connections", self.max_connections, 1),
            ("max_streams", self.max_streams as usize, 1),
            // HTTP/1 needs this much buffer.
            ("max_header_bytes", self.max_header_bytes as usize, 8192),
        ] {
            if value < least {
                return Err(NetError::Limit { name, least });
            }
        }
        Ok(())
    }
}

/// A bound socket; clients queue until it is [served](super::serve).
pub struct Listener {
    socket: Socket,
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) limits: Limits,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener")
            .field("address", &self.local_addr().ok())
            .finish_non_exhaustive()
    }
}

/// Binds the address and loads the certificates.
///
/// # Errors
/// When the address is taken or not this machine's, a limit is out of range, or a TLS file is
/// wrong.
pub async fn bind(config: &ListenConfig) -> Result<Listener, NetError> {
    config.limits.validate()?;
    let tls = config.tls.as_ref().map(ServerTls::acceptor).transpose()?;
    let socket = config.network.bind(config.address).await;
    let socket = socket.map_err(|source| NetError::Bind {
        address: config.address,
        source,
    })?;
    Ok(Listener {
        socket,
        tls,
        limits: config.limits.clone(),
    })
}

impl Listener {
    /// The address, with the port that was taken for port 0.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<(Connection, SocketAddr)> {
        self.socket.accept().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> ListenConfig {
        ListenConfig {
            network: Network::Tcp,
            address: ([127, 0, 0, 1], 0).into(),
            tls: None,
            limits: Limits::default(),
        }
    }

    #[tokio::test]
    async fn a_taken_address_is_named() {
        let listener = bind(&local()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let error = bind(&ListenConfig { address, ..local() })
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), format!("cannot listen on {address}"));
    }

    #[tokio::test]
    async fn limits_are_checked() {
        let mut config = local();
        config.limits.max_header_bytes = 100;
        let error = bind(&config).await.unwrap_err();
        assert_eq!(error.to_string(), "max_header_bytes must be at least 8192");
    }
}
