//! Turmoil's network as a [`Transport`], with connections that can be reset.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use futures::future::{BoxFuture, FutureExt};
use shoal_fabric::{
    membership::Endpoint,
    net::{Accept, Network, Stream, Transport},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use turmoil::net::{TcpListener, TcpStream};

/// The network of every host, and what resets its connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Turmoil(Arc<Mutex<Vec<(String, CancellationToken)>>>);

impl Turmoil {
    pub(crate) fn network(&self) -> Network {
        Network::Other(Arc::new(self.clone()))
    }

    /// Resets every connection to a host.
    pub(crate) fn reset(&self, host: &str) {
        let mut connections = self.0.lock().unwrap();
        let ends = connections.extract_if(.., |(to, _)| to == host);
        ends.for_each(|(_, reset)| reset.cancel());
    }
}

impl Transport for Turmoil {
    fn connect(&self, peer: Endpoint) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let connections = self.0.clone();
        async move {
            let inner = TcpStream::connect((peer.host(), peer.port())).await?;
            let reset = CancellationToken::new();
            let host = peer.host().to_owned();
            connections.lock().unwrap().push((host, reset.clone()));
            let stream = Resettable {
                inner: Some(inner),
                reset: Box::pin(reset.cancelled_owned()),
            };
            Ok(Box::new(stream) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn bind(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Accept>>> {
        async move {
            let listener = TcpListener::bind((IpAddr::from([0, 0, 0, 0]), address.port())).await?;
            Ok(Box::new(Listener(listener)) as Box<dyn Accept>)
        }
        .boxed()
    }
}

struct Listener(TcpListener);

impl Accept for Listener {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn accept(&self) -> BoxFuture<'_, io::Result<(Box<dyn Stream>, SocketAddr)>> {
        async {
            let (stream, peer) = self.0.accept().await?;
            Ok((Box::new(stream) as Box<dyn Stream>, peer))
        }
        .boxed()
    }
}

/// A connection until it is reset, for both ends.
struct Resettable {
    inner: Option<TcpStream>,
    reset: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Resettable {
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.inner.is_some() && self.reset.as_mut().poll(cx).is_ready() {
            self.inner = None;
        }
        match &mut self.inner {
            Some(inner) => poll(Pin::new(inner), cx),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

impl AsyncRead for Resettable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(cx, |inner, cx| inner.poll_read(cx, buf))
    }
}

impl AsyncWrite for Resettable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |inner, cx| inner.poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(cx, |inner, cx| inner.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(cx, |inner, cx| inner.poll_shutdown(cx))
    }
}
