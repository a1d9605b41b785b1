//! `sglang-router` in front of a worker that speaks HTTP.

use std::{net::SocketAddr, path::Path, process::Command, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Duration, MissedTickBehavior, interval},
};

use crate::{
    Result,
    paced::Stamps,
    router::{Router, free_address},
};

/// The router of the package, once it forwards.
pub(crate) async fn sglang_router(python: &Path, worker: SocketAddr) -> Result<Router> {
    let address = free_address()?;
    let mut command = Command::new(python);
    command
        .args(["-m", "sglang_router.launch_router", "--host", "127.0.0.1"])
        .args(["--port", &address.port().to_string()])
        .args(["--worker-urls", &format!("http://{worker}")])
        .args(["--policy", "random", "--log-level", "error"]);
    let router = Router::of(command, address)?;
    router.until("/readiness", " 200 ").await?;
    Ok(router)
}

/// A worker of one token every `pace` for each stream, as server-sent events.
pub(crate) async fn http_worker(stamps: Arc<Stamps>, pace: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that leaves is the end of its stream.
            tokio::spawn(serve(stream, stamps.clone(), pace));
        }
    });
    Ok(address)
}

async fn serve(mut stream: TcpStream, stamps: Arc<Stamps>, pace: Duration) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut request = Vec::new();
    loop {
        request.clear();
        let body = loop {
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
            if let Some(body) = whole(&request) {
                break body;
            }
        };
        let prompt = body.get("prompt").and_then(|prompt| prompt.as_str());
        let Some(mark) = prompt.and_then(|p| p.trim_matches(['~', ';']).parse::<usize>().ok())
        else {
            let answer = r#"{"status": "ok", "data": [], "model_path": "paced"}"#;
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                answer.len()
            );
            stream.write_all((head + answer).as_bytes()).await?;
            continue;
        };
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\
                    Transfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        let mut ticks = interval(pace);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for token in 0..stamps.tokens() {
            ticks.tick().await;
            let event = format!(
                "data: {{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\
                 \"model\":\"paced\",\"choices\":[{{\"index\":0,\"text\":\"~{mark};\",\
                 \"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
            );
            stamps.make(mark, token);
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            stream.write_all(chunk.as_bytes()).await?;
        }
        return Ok(());
    }
}

/// The body of a request that has come whole; null where it has none.
fn whole(request: &[u8]) -> Option<serde_json::Value> {
    let end = request.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&request[..end])
        .ok()?
        .to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    let Some(length) = length.and_then(|length| length.trim().parse::<usize>().ok()) else {
        return Some(serde_json::Value::Null);
    };
    let body = request.get(end..end + length)?;
    Some(serde_json::from_slice(body).unwrap_or_default())
}
