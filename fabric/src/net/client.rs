use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{self, Channel};

use super::{NetError, Network};
use crate::{membership::Endpoint, tls::ClientTls};

/// How channels to peers behave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// What connections are made of.
    pub network: Network,
    /// Plain text without it.
    pub tls: Option<ClientTls>,
    /// For TCP and TLS together.
    pub connect_timeout: Duration,
    /// Between HTTP/2 pings, also while nothing is asked.
    pub keepalive_interval: Duration,
    /// For the answer to a ping; then the connection counts as dead.
    pub keepalive_timeout: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            network: Network::default(),
            tls: None,
            connect_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
        }
    }
}

/// A gRPC channel that connects at its first call, and again after a loss.
///
/// # Errors
/// When a TLS file is wrong. Whether the peer is there shows at the first call.
pub fn channel(endpoint: &Endpoint, config: &ClientConfig) -> Result<Channel, NetError> {
    let refused = |source| NetError::Channel {
        endpoint: endpoint.clone(),
        source,
    };
    let scheme = if config.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let mut builder = transport::Endpoint::from_shared(format!("{scheme}://{endpoint}"))
        .map_err(refused)?
        .connect_timeout(config.connect_timeout)
        .http2_keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout)
        .keep_alive_while_idle(true);
    if let Some(tls) = &config.tls {
        builder = builder.tls_config(tls.config()?).map_err(refused)?;
    }
    let (network, endpoint) = (config.network.clone(), endpoint.clone());
    Ok(
        builder.connect_with_connector_lazy(tower::service_fn(move |_| {
            let (network, endpoint) = (network.clone(), endpoint.clone());
            async move { network.connect(&endpoint).await.map(TokioIo::new) }
        })),
    )
}
