//! Clients that leave, and clients that do not read.

use futures::{StreamExt, stream};
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    mock::{Mock, Script},
    support::{Router, chat_body, content},
};

fn endless() -> Script {
    Script::answer(&"e".repeat(10_000))
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_it() {
    let mut mock = Mock::gated(endless()).await;
    let router = Router::ready(&[&mock]).await;
    let begin = async {
        let submit = mock.submitted().await;
        mock.step(1);
        submit
    };
    let (mut events, submit) = tokio::join!(router.stream(json!({})), begin);
    events.text().await;
    drop(events);
    let cancel = mock.cancelled().await;
    assert_eq!(cancel.sequence, submit.sequence);
    mock.live(0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_cancels_it() {
    let mut mock = Mock::gated(endless()).await;
    let router = Router::ready(&[&mock]).await;
    let body = chat_body(json!({})).to_string();
    let address = router.base.strip_prefix("http://").unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(body.as_bytes()).await.unwrap();
    mock.submitted().await;
    drop(client);
    mock.cancelled().await;
    mock.live(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_disconnects_leave_nothing_behind() {
    let mut mock = Mock::gated(endless()).await;
    let router = Router::ready(&[&mock]).await;
    let leave = |_| async {
        router.stream(json!({})).await.text().await;
    };
    let clients = stream::iter(0..1000).for_each_concurrent(32, leave);
    // A step for each: a worker that ran free could end an answer before its client is gone.
    let steps = async {
        for _ in 0..1000 {
            mock.submitted().await;
            mock.step(1);
        }
    };
    tokio::join!(clients, steps);
    mock.live(0).await;
    let sequences = format!("shoal_worker_sequences{{worker=\"{}\"}}", mock.address);
    router.metric_becomes(&sequences, 0.0).await;
    router.metric_becomes("shoal_requests_running", 0.0).await;
    router.metric_becomes("shoal_requests_waiting", 0.0).await;
    router
        .metric_becomes("shoal_requests_abandoned_total{model=\"mock\"}", 1000.0)
        .await;
    mock.step(2);
    assert_eq!(content(&router.chat(json!({"max_tokens": 2})).await), "ee");
    router.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stalls_nobody() {
    let mock = Mock::start(endless()).await;
    let router = Router::ready(&[&mock]).await;
    let address = router.base.strip_prefix("http://").unwrap();
    let mut sleepers = Vec::new();
    for _ in 0..8 {
        // Log-probabilities make the answer larger than the socket's buffers.
        let fields = json!({"stream": true, "logprobs": true, "top_logprobs": 20, "n": 16});
        let body = chat_body(fields).to_string();
        let mut client = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(body.as_bytes()).await.unwrap();
        sleepers.push(client);
    }
    let answer = router.chat(json!({"max_tokens": 100})).await;
    assert_eq!(content(&answer), "e".repeat(100));
    // The worker is done with the sleepers' sequences, so their room is free again.
    router.metric_becomes("shoal_requests_running", 0.0).await;
    drop(sleepers);
}
