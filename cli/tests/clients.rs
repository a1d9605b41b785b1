//! `shoal chat` and `shoal bench serve` as processes.

#![allow(clippy::unwrap_used)]

#[path = "support/echo.rs"]
mod echo;
mod support;

use std::io::{BufRead, BufReader, Read, Write};

use echo::{Asked, echo};
use shoal_proto::inference::generate_request::Prompt;
use support::shoal;

/// (role, content) of each message of the `n`-th request.
fn messages(asked: &Asked, n: usize) -> Vec<(String, String)> {
    let asked = asked.lock().unwrap();
    let Some(Prompt::Chat(chat)) = &asked[n].1.prompt else {
        panic!("not a chat: {:?}", asked[n].1);
    };
    let pair = |m: &shoal_proto::inference::ChatMessage| (m.role.clone(), m.content.clone());
    chat.messages.iter().map(pair).collect()
}

fn turns(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(role, text): &(&str, &str)| ((*role).to_owned(), (*text).to_owned());
    pairs.iter().map(owned).collect()
}

#[tokio::test]
async fn chat_answers_each_line_and_remembers() {
    let (url, asked) = echo().await;
    let args = [
        "chat",
        "--url",
        &url,
        "--api-key",
        "k",
        "--system",
        "be brief",
        "--seed",
        "7",
        "--max-tokens",
        "9",
    ];
    let ran = shoal(&args, "hello\n\nand now?\n/reset\nagain\n/exit\nnever\n").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(
        ran.stdout,
        "You said: hello\nYou said: and now?\nYou said: again\n"
    );
    assert_eq!(asked.lock().unwrap().len(), 3);
    assert_eq!(
        messages(&asked, 1),
        turns(&[
            ("system", "be brief"),
            ("user", "hello"),
            ("assistant", "You said: hello"),
            ("user", "and now?"),
        ])
    );
    assert_eq!(
        messages(&asked, 2),
        turns(&[("system", "be brief"), ("user", "again")])
    );
    let (key, request) = asked.lock().unwrap()[0].clone();
    assert_eq!(key.as_deref(), Some("Bearer k"));
    assert_eq!(request.sampling.unwrap().seed, Some(7));
    assert_eq!(request.stopping.unwrap().max_tokens, Some(9));
}

#[tokio::test]
async fn a_refusal_ends_a_script_with_its_cause() {
    let (url, _) = echo().await;
    let ran = shoal(&["chat", "--url", &url], "refuse\nhello\n").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("error: the request was refused: "),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("the queue is full"), "{ran:?}");
    assert!(ran.stderr.contains("try again"), "{ran:?}");
}

#[tokio::test]
async fn no_router_is_one_clear_line() {
    let ran = shoal(&["chat", "--url", "http://127.0.0.1:9"], "hello\n").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("cannot connect to http://127.0.0.1:9"),
        "{ran:?}"
    );
}

#[tokio::test]
async fn bench_counts_what_grpc_answers() {
    let (url, asked) = echo().await;
    let args = [
        "bench",
        "serve",
        "--url",
        &url,
        "--requests",
        "20",
        "--concurrency",
        "4",
        "--json",
    ];
    let ran = shoal(&args, "").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["requests"], 20);
    assert_eq!(report["errors"], 0);
    assert_eq!(report["output_tokens"], 100);
    assert_eq!(report["cached_tokens_mean"], 4.0);
    assert!(report["ttft_ms_p99"].as_f64() >= report["ttft_ms_p50"].as_f64());
    assert!(report["tpot_ms_p50"].is_f64());
    assert_eq!(asked.lock().unwrap().len(), 21, "and one to warm up");

    let open = [
        "bench",
        "serve",
        "--url",
        &url,
        "--requests",
        "10",
        "--rate",
        "1000",
    ];
    let ran = shoal(&open, "").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("time to first token"), "{ran:?}");
}

/// Answers every HTTP request with `status` and `body`; the requests it got.
fn http(status: u16, body: &'static str) -> (String, std::sync::mpsc::Receiver<String>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, requests) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut head, mut length) = (String::new(), 0);
            while !head.ends_with("\r\n\r\n") {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let line = line.to_ascii_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                head += &line;
            }
            let mut text = vec![0; length];
            reader.read_exact(&mut text).unwrap();
            let _ = sender.send(head + std::str::from_utf8(&text).unwrap());
            write!(
                stream,
                "HTTP/1.1 {status} x\r\nconnection: close\r\n\r\n{body}"
            )
            .unwrap();
        }
    });
    (url, requests)
}

const EVENTS: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n\
    : a comment\n\
    data: {\"choices\":[{\"delta\":{\"content\":\"Hel\"}}]}\r\n\r\n\
    data: {\"choices\":[{\"delta\":{\"content\":\"lo\"},\"finish_reason\":\"stop\"}],\"usage\":null}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n\
    data: [DONE]\n\n";

#[tokio::test]
async fn bench_reads_event_streams() {
    let (url, requests) = http(200, EVENTS);
    let base = format!("{url}/v1");
    let args = [
        "bench",
        "serve",
        "--api",
        "http",
        "--url",
        &base,
        "--model",
        "m",
        "--requests",
        "6",
        "--ignore-eos",
        "--json",
    ];
    let ran = shoal(&args, "").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["output_tokens"], 18);
    assert_eq!(report["prompt_tokens_mean"], 8.0);
    assert_eq!(report["cached_tokens_mean"], 2.0);
    let request = requests.recv().unwrap();
    assert!(
        request.starts_with("post /v1/chat/completions "),
        "{request}"
    );
    assert!(
        request.contains("\"ignore_eos\":true") && request.contains("\"model\":\"m\""),
        "{request}"
    );
}

#[tokio::test]
async fn bench_tells_why_all_failed() {
    let (url, _requests) = http(400, "{\"error\":{\"message\":\"no such model\"}}");
    let args = [
        "bench",
        "serve",
        "--api",
        "http",
        "--url",
        &url,
        "--requests",
        "2",
    ];
    let ran = shoal(&args, "").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("HTTP 400") && ran.stderr.contains("no such model"),
        "{ran:?}"
    );

    let (url, _requests) = http(200, "data: {\"error\":{\"message\":\"worker lost\"}}\n\n");
    let args = [
        "bench",
        "serve",
        "--api",
        "http",
        "--url",
        &url,
        "--requests",
        "2",
    ];
    let ran = shoal(&args, "").await;
    assert!(ran.stderr.contains("worker lost"), "{ran:?}");
}

#[tokio::test]
async fn wrong_usage_exits_with_2() {
    for args in [
        &["nonsense"][..],
        &["chat", "--temperature", "warm"],
        &["bench", "serve", "--rate", "-1"],
        &["bench", "serve", "--concurrency", "0"],
        &["model", "fetch", "ftp://x"],
    ] {
        let ran = shoal(args, "").await;
        assert_eq!(ran.code, Some(2), "{args:?}: {ran:?}");
    }
}
