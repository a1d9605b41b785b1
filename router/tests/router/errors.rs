//! Every mistake has its status and its typed error, and the router lives on.

use serde_json::{Value, json};

use crate::{
    mock::{Mock, Script},
    support::{Router, args, content, error_of},
};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn wrong_requests_are_400_and_name_the_parameter() {
    let mock = Mock::start(Script::answer("fine")).await;
    let router = Router::ready(&[&mock]).await;
    let message = json!([{"role": "user", "content": "x"}]);
    let chat = |field: &str, value: Value| {
        let mut body = json!({"messages": message});
        body[field] = value;
        (CHAT, body)
    };
    let text = |field: &str, value: Value| {
        let mut body = json!({"prompt": "x"});
        body[field] = value;
        (TEXT, body)
    };
    let long: Vec<u32> = vec![65; 513];
    let stops: Vec<String> = (0..17).map(|i| i.to_string()).collect();
    for ((path, body), code, param) in [
        ((CHAT, json!({})), "invalid_value", Some("messages")),
        ((TEXT, json!({})), "invalid_value", Some("prompt")),
        (
            chat("messages", json!([])),
            "invalid_value",
            Some("messages"),
        ),
        (
            chat("messages", json!("x")),
            "invalid_type",
            Some("messages"),
        ),
        (
            chat("messages", json!([{"content": "x"}])),
            "invalid_type",
            Some("messages[0]"),
        ),
        (
            chat("messages", json!([{"role": "user"}])),
            "invalid_value",
            Some("messages[0].content"),
        ),
        (
            chat("messages", json!([{"role": "pope", "content": ""}])),
            "invalid_value",
            Some("messages[0].role"),
        ),
        (
            chat(
                "messages",
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            ),
            "unsupported_parameter",
            Some("messages[0].content[0].type"),
        ),
        (
            chat("messages", json!([{"role": "tool", "content": "x"}])),
            "unsupported_parameter",
            Some("messages[0].role"),
        ),
        (
            chat("max_tokens", json!(0)),
            "invalid_value",
            Some("max_tokens"),
        ),
        (
            chat("max_tokens", json!(-1)),
            "invalid_type",
            Some("max_tokens"),
        ),
        (
            chat("max_tokens", json!("many")),
            "invalid_type",
            Some("max_tokens"),
        ),
        (
            chat("temperature", json!(-0.1)),
            "invalid_value",
            Some("temperature"),
        ),
        (
            chat("temperature", json!(1e39)),
            "invalid_value",
            Some("temperature"),
        ),
        (
            chat("temperature", json!("hot")),
            "invalid_type",
            Some("temperature"),
        ),
        (chat("top_p", json!(0)), "invalid_value", Some("top_p")),
        (chat("min_p", json!(1.5)), "invalid_value", Some("min_p")),
        (
            chat("presence_penalty", json!(3)),
            "invalid_value",
            Some("presence_penalty"),
        ),
        (
            chat("frequency_penalty", json!(-3)),
            "invalid_value",
            Some("frequency_penalty"),
        ),
        (
            chat("repetition_penalty", json!(0)),
            "invalid_value",
            Some("repetition_penalty"),
        ),
        (
            chat("logit_bias", json!({"x": 1})),
            "invalid_value",
            Some("logit_bias"),
        ),
        (
            chat("logit_bias", json!({"999": 1})),
            "invalid_value",
            Some("logit_bias"),
        ),
        (
            chat("logit_bias", json!({"1": 101})),
            "invalid_value",
            Some("logit_bias"),
        ),
        (chat("n", json!(0)), "invalid_value", Some("n")),
        (chat("n", json!(17)), "invalid_value", Some("n")),
        (chat("stop", json!(stops)), "invalid_value", Some("stop")),
        (chat("stop", json!("")), "invalid_value", Some("stop")),
        (chat("stop", json!(5)), "invalid_type", Some("stop")),
        (chat("seed", json!(1.5)), "invalid_value", Some("seed")),
        (
            chat("min_tokens", json!(600)),
            "invalid_value",
            Some("min_tokens"),
        ),
        (
            chat("top_logprobs", json!(2)),
            "invalid_value",
            Some("top_logprobs"),
        ),
        (
            chat("logprobs", json!(2)),
            "invalid_value",
            Some("logprobs"),
        ),
        (
            chat("stream_options", json!({"include_usage": true})),
            "invalid_value",
            Some("stream_options"),
        ),
        (
            chat("tools", json!([{"type": "function"}])),
            "unsupported_parameter",
            Some("tools"),
        ),
        (
            chat("response_format", json!({"type": "json_object"})),
            "unsupported_parameter",
            Some("response_format"),
        ),
        (
            chat("priority", json!("urgent")),
            "invalid_type",
            Some("priority"),
        ),
        (
            text("suffix", json!("x")),
            "unsupported_parameter",
            Some("suffix"),
        ),
        (
            text("best_of", json!(2)),
            "unsupported_parameter",
            Some("best_of"),
        ),
        (
            text("max_tokens", json!(0)),
            "invalid_value",
            Some("max_tokens"),
        ),
        (
            text("logprobs", json!(21)),
            "invalid_value",
            Some("top_logprobs"),
        ),
        (text("prompt", json!("")), "invalid_value", Some("prompt")),
        (text("prompt", json!([])), "invalid_value", Some("prompt")),
        (
            text("prompt", json!([[300]])),
            "invalid_value",
            Some("prompt"),
        ),
        (text("prompt", json!(7)), "invalid_type", Some("prompt")),
        (
            text("prompt", json!(long)),
            "context_length_exceeded",
            Some("prompt"),
        ),
        (
            text("prompt", json!("y".repeat(600))),
            "context_length_exceeded",
            Some("prompt"),
        ),
    ] {
        let (status, error) = router.error(path, body.clone()).await;
        assert_eq!(
            (status, &error["code"]),
            (400, &json!(code)),
            "{body}: {error}"
        );
        assert_eq!(error["param"].as_str(), param, "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert_eq!(content(&router.chat(json!({})).await), "fine");
}

#[tokio::test]
async fn bodies_that_are_no_json() {
    let mock = Mock::start(Script::answer("fine")).await;
    let router = Router::ready(&[&mock]).await;
    for (body, code) in [
        (&b"{"[..], "invalid_json"),
        (b"", "invalid_json"),
        (b"[1]", "invalid_type"),
        (b"{\"messages\": NaN}", "invalid_json"),
        (b"{\"temperature\": NaN}", "invalid_json"),
        (b"{\"user\": \"\xff\xfe\"}", "invalid_utf8"),
        (b"\x00", "invalid_json"),
    ] {
        let request = router
            .http
            .post(format!("{}{CHAT}", router.base))
            .body(body.to_vec());
        let (status, error) = error_of(request.send().await.unwrap()).await;
        assert_eq!((status, &error["code"]), (400, &json!(code)), "{body:?}");
    }
    // JSON nested deeper than any request.
    let deep = format!("{{\"x\": {}", "[".repeat(100_000));
    let request = router
        .http
        .post(format!("{}{CHAT}", router.base))
        .body(deep);
    assert_eq!(error_of(request.send().await.unwrap()).await.0, 400);
    assert_eq!(content(&router.chat(json!({})).await), "fine");
}

#[tokio::test]
async fn a_large_body_is_413() {
    let mock = Mock::start(Script::answer("fine")).await;
    let mut args = args(&[&mock]);
    args.max_body_bytes = 100_000;
    let router = Router::ready_with(args).await;
    let content_of =
        |size: usize| json!({"messages": [{"role": "user", "content": "x".repeat(size)}]});
    let (status, error) = router.error(CHAT, content_of(10_000_000)).await;
    assert_eq!((status, &error["code"]), (413, &json!("body_too_large")));
    let (status, error) = router.error(CHAT, content_of(90_000)).await;
    assert_eq!(
        (status, &error["code"]),
        (400, &json!("context_length_exceeded"))
    );
    assert_eq!(content(&router.chat(json!({})).await), "fine");
}

#[tokio::test]
async fn unknown_models_and_routes() {
    let mock = Mock::start(Script::answer("fine")).await;
    let router = Router::ready(&[&mock]).await;
    let (status, error) = router
        .error(TEXT, json!({"model": "gpt-9", "prompt": "x"}))
        .await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    assert_eq!(error["param"], "model");
    let (status, error) = router.error("/v1/nothing", json!({})).await;
    assert_eq!((status, &error["code"]), (404, &json!("unknown_url")));
    let response = router
        .http
        .get(format!("{}{CHAT}", router.base))
        .send()
        .await
        .unwrap();
    let (status, error) = error_of(response).await;
    assert_eq!(
        (status, &error["code"]),
        (405, &json!("method_not_allowed"))
    );
}

#[tokio::test]
async fn a_template_that_refuses_is_400() {
    let mock = Mock::start(Script::answer("fine")).await;
    let router = Router::ready(&[&mock]).await;
    let mut grpc = router.grpc().await;
    let status = grpc
        .generate(crate::grpc::chat("bad", "x"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert_eq!(status.message(), "bad role");
}
