//! Health as operators see it.

use std::time::Duration;

use serde_json::{Value, json};
use shoal_proto::worker::WorkerState;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    mock::{Mock, Script},
    support::{Router, args, chat_body, error_of, joined},
};

#[tokio::test]
async fn health_follows_the_workers_and_live_does_not() {
    let mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    let check = async |ready: u16| {
        assert_eq!(router.get("/health").await.0, ready);
        assert_eq!(router.get("/ready").await.0, ready);
        assert_eq!(router.get("/live").await.0, 200);
    };
    check(200).await;
    mock.set_state(WorkerState::Draining);
    router.becomes(ServingStatus::NotServing).await;
    check(503).await;
    mock.set_state(WorkerState::Ready);
    router.becomes(ServingStatus::Serving).await;
    check(200).await;
    drop(mock);
    router.becomes(ServingStatus::NotServing).await;
    check(503).await;
}

#[tokio::test]
async fn without_any_worker_requests_are_503() {
    let mock = Mock::start(Script::answer("x")).await;
    let mut args = args(&[&mock]);
    args.resume_window = Duration::from_millis(200);
    drop(mock);
    let router = Router::start(args).await;
    let response = router
        .post("/v1/chat/completions", chat_body(json!({})))
        .await;
    assert_eq!(response.headers()["retry-after"], "1");
    let (status, error) = error_of(response).await;
    assert_eq!((status, &error["code"]), (503, &json!("no_ready_worker")));
    assert_eq!(router.get("/health").await.0, 503);
    assert_eq!(router.get("/live").await.0, 200);
    router.stop().await;
}

#[tokio::test]
async fn a_request_waits_for_the_first_worker_and_for_the_next() {
    let mock = Mock::start(Script::answer("patience")).await;
    let (address, args) = (mock.address, args(&[&mock]));
    drop(mock);
    let router = Router::start(args).await;
    let ask = || router.post("/v1/chat/completions", chat_body(json!({})));
    let worker = async {
        router.metric_becomes("shoal_requests_waiting", 1.0).await;
        Mock::start_at(address, Script::answer("patience")).await
    };
    let (response, mock) = tokio::join!(ask(), worker);
    assert_eq!(response.status(), 200);
    mock.set_state(WorkerState::Draining);
    router.becomes(ServingStatus::NotServing).await;
    let undrain = async {
        router.metric_becomes("shoal_requests_running", 1.0).await;
        mock.set_state(WorkerState::Ready);
    };
    let (response, ()) = tokio::join!(ask(), undrain);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["choices"][0]["message"]["content"], "patience");
}

#[tokio::test]
async fn a_shutdown_lets_open_answers_end() {
    let mock = Mock::gated(Script::answer("to the end")).await;
    let router = Router::ready(&[&mock]).await;
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (events, ()) = tokio::join!(router.stream(json!({})), begin);
    router.shutdown.start();
    // New connections are told so, for as long as the answer is open.
    let newcomer = reqwest::Client::new();
    let health = newcomer.get(format!("{}/health", router.base));
    let health = health.send().await.unwrap();
    assert_eq!(health.status(), 503);
    let health: Value = health.json().await.unwrap();
    assert_eq!(health["status"], "draining");
    assert_eq!(router.get("/live").await.0, 200);
    let response = router
        .post("/v1/chat/completions", chat_body(json!({})))
        .await;
    assert!(response.headers().contains_key("retry-after"));
    let (status, error) = error_of(response).await;
    assert_eq!((status, &error["code"]), (503, &json!("draining")));
    mock.step(20);
    let chunks = events.rest().await;
    assert_eq!(joined(&chunks, 0), "to the end");
    router.stop().await;
}

#[tokio::test]
async fn a_drain_has_an_end() {
    let mock = Mock::gated(Script::answer("never to the end")).await;
    let mut args = args(&[&mock]);
    args.drain = Duration::from_millis(100);
    let router = Router::ready_with(args).await;
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (mut events, ()) = tokio::join!(router.stream(json!({})), begin);
    assert_eq!(events.text().await, "n");
    let waiting = router.post("/v1/completions", json!({"prompt": "x"}));
    let end = async {
        mock.live(2).await;
        router.shutdown.start();
    };
    let (waiting, ()) = tokio::join!(waiting, end);
    let (status, error) = error_of(waiting).await;
    assert_eq!((status, &error["code"]), (503, &json!("draining")));
    assert_eq!(events.chunk().await["error"]["code"], "draining");
    assert_eq!(events.next().await, None);
    mock.live(0).await;
    router.stop().await;
}

#[tokio::test]
async fn metrics_count() {
    let mock = Mock::start(Script::answer("four")).await;
    let router = Router::ready(&[&mock]).await;
    router
        .post("/v1/chat/completions", chat_body(json!({})))
        .await
        .bytes()
        .await
        .unwrap();
    router.post("/v1/chat/completions", json!({})).await;
    let route = "shoal_requests_total{route=\"/v1/chat/completions\"";
    for (name, value) in [
        (format!("{route},code=\"200\"}}"), 1.0),
        (format!("{route},code=\"400\"}}"), 1.0),
        (
            "shoal_time_to_first_token_seconds_count{model=\"mock\"}".into(),
            1.0,
        ),
        (
            "shoal_e2e_request_latency_seconds_count{model=\"mock\"}".into(),
            1.0,
        ),
        (
            "shoal_request_queue_time_seconds_count{model=\"mock\"}".into(),
            1.0,
        ),
        ("shoal_prompt_tokens_total{model=\"mock\"}".into(), 4.0),
        (
            "shoal_cached_prompt_tokens_total{model=\"mock\"}".into(),
            2.0,
        ),
        ("shoal_output_tokens_total{model=\"mock\"}".into(), 5.0),
        ("shoal_rejects_total{reason=\"invalid_value\"}".into(), 1.0),
        (
            format!("shoal_worker_up{{worker=\"{}\"}}", mock.address),
            1.0,
        ),
        (
            format!("shoal_worker_ready{{worker=\"{}\"}}", mock.address),
            1.0,
        ),
    ] {
        router.metric_becomes(&name, value).await;
    }
}
