//! A client that costs little: one connection and one request at a time, and no parsing
//! beyond what is measured.

use std::net::SocketAddr;

use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::Result;

/// One request under way.
pub(crate) struct Exchange {
    stream: TcpStream,
    /// What has come so far.
    pub(crate) bytes: Vec<u8>,
}

impl Exchange {
    /// Sends a request with a JSON body.
    pub(crate) async fn post(to: SocketAddr, path: &str, body: &str) -> Result<Self> {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        Self::send(to, head + body).await
    }

    /// Sends a request without a body.
    pub(crate) async fn get(to: SocketAddr, path: &str) -> Result<Self> {
        let head = format!("GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
        Self::send(to, head).await
    }

    async fn send(to: SocketAddr, request: String) -> Result<Self> {
        let mut stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        stream.write_all(request.as_bytes()).await?;
        Ok(Self {
            stream,
            bytes: Vec::new(),
        })
    }

    /// Waits for more; the new bytes, none at the end.
    pub(crate) async fn more(&mut self) -> Result<&[u8]> {
        let before = self.bytes.len();
        self.bytes.reserve(4096);
        self.stream.read_buf(&mut self.bytes).await?;
        Ok(&self.bytes[before..])
    }

    /// Waits for the end.
    pub(crate) async fn finish(&mut self) -> Result<()> {
        while !self.more().await?.is_empty() {}
        Ok(())
    }

    /// The status, once it has come.
    pub(crate) fn status(&self) -> u16 {
        let digits = self.bytes.get(9..12).unwrap_or_default();
        std::str::from_utf8(digits)
            .ok()
            .and_then(|d| d.parse().ok())
            .unwrap_or(0)
    }

    /// Whether the text has come.
    pub(crate) fn has(&self, text: &str) -> bool {
        self.bytes
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    }

    /// The number that follows the last `name`.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        let text = String::from_utf8_lossy(&self.bytes);
        let rest = &text[text.rfind(name)? + name.len()..];
        let digits = rest.trim_start_matches(['"', ':', ' ']);
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        digits[..end].parse().ok()
    }
}

/// Where [`completion`]s go.
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// A body for [`COMPLETIONS`].
pub(crate) fn completion(prompt: impl Serialize, max_tokens: usize, stream: bool) -> String {
    serde_json::json!({
        "model": "paced",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
        "stream_options": stream.then(|| serde_json::json!({"include_usage": true})),
    })
    .to_string()
}
