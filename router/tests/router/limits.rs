//! Queue, keys and quotas.

use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shoal_core::Namespace;
use shoal_proto::worker::RejectReason;

use crate::{
    mock::{Mock, Script},
    support::{Router, args, chat_body, error_of},
};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_full_queue_is_429_with_the_time_to_wait() {
    let mut mock = Mock::gated(Script::answer(&"q".repeat(1000))).await;
    let mut args = args(&[&mock]);
    (args.max_running, args.max_waiting) = (1, 1);
    let router = Router::ready_with(args).await;
    let refused = async {
        mock.live(1).await;
        router.metric_becomes("shoal_requests_waiting", 1.0).await;
        let response = router.post(CHAT, chat_body(json!({}))).await;
        let wait: u64 = response.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!((1..=60).contains(&wait));
        let (status, error) = error_of(response).await;
        assert_eq!((status, &error["code"]), (429, &json!("queue_full")));
        assert_eq!(error["type"], "rate_limit_error");
        mock.step(10);
        // The waiting one follows as soon as the running one is done.
        assert_eq!(mock.submitted().await.attempt, 0);
        assert_eq!(mock.submitted().await.attempt, 0);
    };
    let fields = || json!({"max_tokens": 5});
    let (a, b, ()) = tokio::join!(router.chat(fields()), router.chat(fields()), refused);
    for answer in [a, b] {
        assert_eq!(answer["usage"]["completion_tokens"], 5);
    }
    assert_eq!(
        router
            .metric("shoal_rejects_total{reason=\"queue_full\"}")
            .await,
        Some(1.0)
    );
}

#[tokio::test]
async fn overloaded_workers_are_429() {
    let mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    mock.set_script(|script| script.reject = Some(RejectReason::Overloaded));
    let response = router.post(CHAT, chat_body(json!({"stream": true}))).await;
    assert!(response.headers().contains_key("retry-after"));
    let (status, error) = error_of(response).await;
    assert_eq!((status, &error["code"]), (429, &json!("overloaded")));
    mock.set_script(|script| script.reject = Some(RejectReason::Invalid));
    let (status, error) = router.error(CHAT, chat_body(json!({}))).await;
    assert_eq!((status, &error["code"]), (400, &json!("invalid_request")));
    router.metric_becomes("shoal_requests_running", 0.0).await;
}

#[tokio::test]
async fn a_deadline_ends_a_request() {
    let mut mock = Mock::gated(Script::answer("never")).await;
    let mut args = args(&[&mock]);
    args.request_timeout = Duration::from_millis(300);
    let router = Router::ready_with(args).await;
    let (status, error) = router.error(CHAT, chat_body(json!({}))).await;
    assert_eq!((status, &error["code"]), (504, &json!("deadline_exceeded")));
    let submit = mock.submitted().await;
    assert!((1..=300).contains(&submit.deadline_in_ms));
    mock.cancelled().await;
}

fn key_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn sha256(key: &str) -> String {
    Sha256::digest(key)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

async fn with_key(router: &Router, key: &str, body: Value) -> reqwest::Response {
    let request = router
        .http
        .post(format!("{}{CHAT}", router.base))
        .json(&body);
    request.bearer_auth(key).send().await.unwrap()
}

#[tokio::test]
async fn keys_name_the_tenant() {
    let mut mock = Mock::start(Script::answer("x")).await;
    let file = key_file(&format!(
        "[[keys]]\nsha256 = \"{}\"\ntenant = \"acme\"\n",
        sha256("k1")
    ));
    let mut args = args(&[&mock]);
    args.api_keys = Some(file.path().into());
    let router = Router::ready_with(args).await;

    assert_eq!(
        with_key(&router, "k1", chat_body(json!({}))).await.status(),
        200
    );
    let namespace = mock.submitted().await.cache_namespace;
    assert_eq!(namespace, Namespace::new("acme", "").as_bytes());

    let response = with_key(&router, "k2", chat_body(json!({}))).await;
    assert_eq!(response.headers()["www-authenticate"], "Bearer");
    let (status, error) = error_of(response).await;
    assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")));
    assert_eq!(error["type"], "authentication_error");
    for path in [CHAT, "/v1/completions", "/tokenize", "/detokenize"] {
        assert_eq!(router.error(path, json!({})).await.0, 401, "{path}");
    }
    assert_eq!(router.get("/v1/models").await.0, 401);
    for path in ["/health", "/ready", "/live"] {
        assert_eq!(router.get(path).await.0, 200, "{path}");
    }
    let status = router
        .grpc()
        .await
        .generate(crate::grpc::chat("user", "x"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
}

#[tokio::test]
async fn quotas_are_the_tenants() {
    let mock = Mock::start(Script::answer("x")).await;
    let mut text = "[[tenants]]\nname = \"small\"\nrequests_per_minute = 2\n".to_owned();
    for (key, tenant) in [("a", "small"), ("b", "small"), ("c", "free")] {
        text += &format!(
            "[[keys]]\nsha256 = \"{}\"\ntenant = \"{tenant}\"\n",
            sha256(key)
        );
    }
    let file = key_file(&text);
    let mut args = args(&[&mock]);
    args.api_keys = Some(file.path().into());
    let router = Router::ready_with(args).await;
    for key in ["a", "b"] {
        assert_eq!(
            with_key(&router, key, chat_body(json!({}))).await.status(),
            200
        );
    }
    let response = with_key(&router, "a", chat_body(json!({}))).await;
    let wait: u64 = response.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=30).contains(&wait));
    let (status, error) = error_of(response).await;
    assert_eq!(
        (status, &error["code"]),
        (429, &json!("rate_limit_exceeded"))
    );
    assert_eq!(
        with_key(&router, "c", chat_body(json!({}))).await.status(),
        200
    );
}
