//! Sockets: a listener that serves HTTP/1.1, HTTP/2 and gRPC on one port, and channels to
//! peers. Every TCP socket has TCP_NODELAY: a token must not wait for the acknowledgement of
//! the one before it.

mod client;
mod listen;
mod network;
mod serve;

pub use client::{ClientConfig, channel};
pub use listen::{Limits, ListenConfig, Listener, bind};
pub use network::{Accept, Network, Stream, Transport};
pub use serve::{one_port, serve};

use shoal_core::Class;

use crate::tls::TlsError;

/// A socket that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A limit that lets nothing through.
    #[error("{name} must be at least {least}")]
    Limit {
        /// Which.
        name: &'static str,
        /// Its least value.
        least: usize,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The channel cannot be made.
    #[error("channel to {endpoint}")]
    Channel {
        /// The peer.
        endpoint: crate::membership::Endpoint,
        /// Why.
        source: tonic::transport::Error,
    },
}

impl NetError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Bind { .. } | Self::Limit { .. } | Self::Tls(_) | Self::Channel { .. } => {
                Class::Fatal
            }
        }
    }
}
