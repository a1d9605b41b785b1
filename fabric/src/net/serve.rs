use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{io::InspectReader, sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use super::{Limits, Listener, network::Connection};

/// Length of the HTTP/2 preface: after so many bytes the protocol is known, and hyper's own
/// timeouts hold.
const PREFACE: usize = 24;
/// Between attempts when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// HTTP routes and gRPC services as one application. A path that neither knows goes to the
/// fallback of `http`, and a gRPC client reads its 404 as UNIMPLEMENTED.
pub fn one_port(http: Router, grpc: Routes) -> Router {
    http.merge(grpc.into_axum_router().reset_fallback())
}

/// Serves `app` until `stop`; then takes no new connections or requests, gives the open ones
/// `Limits::drain`, and cuts off what is left.
pub async fn serve(listener: Listener, app: Router, stop: CancellationToken) {
    let connections = TaskTracker::new();
    let cut = CancellationToken::new();
    let slots = Arc::new(Semaphore::new(listener.limits.max_connections));
    let server = Arc::new(Server {
        protocol: protocol(&listener.limits),
        app: TowerToHyperService::new(app),
        tls: listener.tls.clone(),
        header_timeout: listener.limits.header_timeout,
        stop: stop.clone(),
    });
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(connection) => connection,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "connection refused: too many are open");
            continue;
        };
        let (server, cut) = (server.clone(), cut.clone());
        connections.spawn(async move {
            let _slot = slot;
            cut.run_until_cancelled(server.connection(stream, peer))
                .await;
        });
    }
    let drain = listener.limits.drain;
    drop(listener);
    connections.close();
    if timeout(drain, connections.wait()).await.is_err() {
        tracing::warn!(open = connections.len(), "connections cut off");
        cut.cancel();
        connections.wait().await;
    }
}

/// Whether the failure was of the peer's making, and the next connection may be fine.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::NotConnected
    )
}

fn protocol(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut protocol = auto::Builder::new(TokioExecutor::new());
    protocol
        .http1()
        .timer(TokioTimer::new())
        // A token's chunk is small: one copy costs less than a list of its parts.
        .writev(false)
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(limits.max_header_bytes as usize);
    protocol
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout)
        .max_concurrent_streams(limits.max_streams)
        .max_header_list_size(limits.max_header_bytes);
    protocol
}

/// What all connections share.
struct Server {
    protocol: auto::Builder<TokioExecutor>,
    app: TowerToHyperService<Router>,
    tls: Option<TlsAcceptor>,
    header_timeout: Duration,
    stop: CancellationToken,
}

impl Server {
    async fn connection(&self, stream: Connection, peer: SocketAddr) {
        let Some(tls) = &self.tls else {
            return self.http(stream, peer).await;
        };
        match timeout(self.header_timeout, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.http(stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
        }
    }

    async fn http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: SocketAddr,
    ) {
        let received = Arc::new(AtomicUsize::new(0));
        let count = received.clone();
        let stream = InspectReader::new(stream, move |bytes: &[u8]| {
            count.fetch_add(bytes.len(), Ordering::Relaxed);
        });
        let connection = self
            .protocol
            .serve_connection(TokioIo::new(stream), self.app.clone());
        let mut connection = std::pin::pin!(connection);
        let preface = tokio::time::sleep(self.header_timeout);
        let mut preface = std::pin::pin!(preface);
        let (mut waiting, mut stopping) = (true, false);
        let result = loop {
            tokio::select! {
                result = connection.as_mut() => break result,
                () = self.stop.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = preface.as_mut(), if waiting => {
                    waiting = false;
                    if received.load(Ordering::Relaxed) < PREFACE {
                        tracing::debug!(%peer, "closed: no request came");
                        return;
                    }
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(%peer, %error, "connection failed");
        }
    }
}
