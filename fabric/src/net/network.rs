use std::{fmt, io, net::SocketAddr, sync::Arc};

use futures::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_util::either::Either;

use crate::membership::Endpoint;

/// What listeners and channels are made of: TCP, or what stands for it in a simulation.
#[derive(Clone, Debug, Default)]
pub enum Network {
    /// The operating system's TCP, without Nagle's delay.
    #[default]
    Tcp,
    /// Another one.
    Other(Arc<dyn Transport>),
}

impl PartialEq for Network {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp, Self::Tcp) => true,
            (Self::Other(a), Self::Other(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Eq for Network {}

/// Makes connections that behave as TCP's do.
pub trait Transport: fmt::Debug + Send + Sync {
    /// Connects to a peer.
    fn connect(&self, peer: Endpoint) -> BoxFuture<'static, io::Result<Box<dyn Stream>>>;

    /// Listens at an address.
    fn bind(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Accept>>>;
}

/// A connection of a [`Transport`].
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A listener of a [`Transport`].
pub trait Accept: Send + Sync {
    /// Where it listens.
    ///
    /// # Errors
    /// When that is not known.
    fn local_addr(&self) -> io::Result<SocketAddr>;

    /// Waits for the next connection and its peer's address. Cancel-safe.
    fn accept(&self) -> BoxFuture<'_, io::Result<(Box<dyn Stream>, SocketAddr)>>;
}

/// A connection of either kind.
pub(super) type Connection = Either<TcpStream, Box<dyn Stream>>;

/// A listener of either kind.
pub(super) enum Socket {
    Tcp(TcpListener),
    Other(Box<dyn Accept>),
}

impl Network {
    pub(super) async fn connect(&self, peer: &Endpoint) -> io::Result<Connection> {
        Ok(match self {
            Self::Tcp => {
                let stream = TcpStream::connect((peer.host(), peer.port())).await?;
                stream.set_nodelay(true)?;
                Either::Left(stream)
            }
            Self::Other(transport) => Either::Right(transport.connect(peer.clone()).await?),
        })
    }

    pub(super) async fn bind(&self, address: SocketAddr) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp => Socket::Tcp(TcpListener::bind(address).await?),
            Self::Other(transport) => Socket::Other(transport.bind(address).await?),
        })
    }
}

impl Socket {
    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Other(listener) => listener.local_addr(),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<(Connection, SocketAddr)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Either::Left(stream), peer))
            }
            Self::Other(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Either::Right(stream), peer))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tcp_connections_have_no_delay() {
        let socket = Network::Tcp.bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let peer = socket.local_addr().unwrap().to_string().parse().unwrap();
        let (dialled, accepted) = tokio::join!(Network::Tcp.connect(&peer), socket.accept());
        for stream in [dialled.unwrap(), accepted.unwrap().0] {
            let Either::Left(stream) = stream else {
                panic!("not of TCP");
            };
            assert!(stream.nodelay().unwrap());
        }
    }
}
