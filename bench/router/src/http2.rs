//! Connections that streams share.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::{
    RecvStream,
    client::{Builder, SendRequest},
};
use tokio::net::TcpStream;

use crate::Result;

/// More bytes than a client leaves unread.
const WINDOW: u32 = 1 << 20;

/// Some connections to one server.
pub(crate) struct Connections(Vec<SendRequest<Bytes>>);

impl Connections {
    /// Opens so many.
    pub(crate) async fn open(to: SocketAddr, count: usize) -> Result<Self> {
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            let (send, connection) = Builder::new()
                .initial_connection_window_size(WINDOW)
                .initial_window_size(WINDOW)
                .handshake(stream)
                .await?;
            // It ends with its last sender.
            tokio::spawn(connection);
            all.push(send);
        }
        Ok(Self(all))
    }

    /// One of them, by turns.
    pub(crate) fn of(&self, stream: usize) -> SendRequest<Bytes> {
        self.0[stream % self.0.len()].clone()
    }
}

/// Sends a request with a JSON body; its answer as it comes.
pub(crate) async fn post(on: SendRequest<Bytes>, path: &str, body: String) -> Result<RecvStream> {
    let request = http::Request::post(format!("http://bench{path}"))
        .header("content-type", "application/json")
        .body(())?;
    let (response, mut out) = on.ready().await?.send_request(request, false)?;
    out.send_data(body.into(), true)?;
    Ok(response.await?.into_body())
}
