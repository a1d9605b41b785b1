//! The native API.

use prost::Message as _;
use shoal_proto::inference::{
    ChatMessage, ChatPrompt, Constraint, DetokenizeRequest, ErrorDetail, FinishReason,
    GenerateRequest, ListModelsRequest, ResponseOptions, Sampling, Stopping, TokenizeRequest,
    constraint, generate_request::Prompt,
};
use tonic::{Code, Status};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    mock::{MODEL, Mock, Script, tokens},
    support::Router,
};

pub(crate) fn chat(role: &str, content: &str) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Chat(ChatPrompt {
            messages: vec![ChatMessage {
                role: role.into(),
                content: content.into(),
                ..ChatMessage::default()
            }],
            add_generation_prompt: None,
        })),
        ..GenerateRequest::default()
    }
}

fn text(prompt: &str) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text(prompt.into())),
        ..GenerateRequest::default()
    }
}

/// The typed detail of an error.
fn detail(status: &Status) -> ErrorDetail {
    let details = tonic_types::pb::Status::decode(status.details()).unwrap();
    assert_eq!(details.code, status.code() as i32);
    let any = &details.details[0];
    assert_eq!(
        any.type_url,
        "type.googleapis.com/shoal.inference.v1.ErrorDetail"
    );
    ErrorDetail::decode(any.value.as_slice()).unwrap()
}

#[tokio::test]
async fn whole_answers() {
    let mut mock = Mock::start(Script::answer("grün STOP")).await;
    let router = Router::ready(&[&mock]).await;
    let request = GenerateRequest {
        request_id: "r1".into(),
        sampling: Some(Sampling {
            seed: Some(u64::MAX),
            ..Sampling::default()
        }),
        stopping: Some(Stopping {
            stop: vec!["STOP".into()],
            ..Stopping::default()
        }),
        response: Some(ResponseOptions {
            logprobs: true,
            top_logprobs: 1,
            echo: false,
        }),
        ..chat("user", "Hi")
    };
    let response = router
        .grpc()
        .await
        .generate(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (response.request_id.as_str(), response.model.as_str()),
        ("r1", MODEL)
    );
    assert_eq!(response.seed, u64::MAX);
    let choice = &response.choices[0];
    assert_eq!(choice.text, "grün ");
    assert_eq!(choice.token_ids, tokens("grün "));
    assert_eq!(choice.logprobs.len(), 6);
    assert_eq!(choice.logprobs[0].token, b"g");
    assert_eq!(choice.logprobs[0].top[0].token, b"a");
    assert_eq!(choice.finish_reason(), FinishReason::Stop);
    assert_eq!(choice.stop, "STOP");
    assert_eq!(response.usage.unwrap().completion_tokens, 10);
    assert_eq!(mock.submitted().await.request_id, "r1");
}

#[tokio::test]
async fn streamed_answers() {
    let mock = Mock::start(Script::answer("día")).await;
    let router = Router::ready(&[&mock]).await;
    let request = GenerateRequest {
        sampling: Some(Sampling {
            n: Some(2),
            ..Sampling::default()
        }),
        ..text("p")
    };
    let mut chunks = router
        .grpc()
        .await
        .generate_stream(request)
        .await
        .unwrap()
        .into_inner();
    let (mut texts, mut ends, mut usage) = ([String::new(), String::new()], 0, None);
    while let Some(chunk) = chunks.message().await.unwrap() {
        assert!(usage.is_none(), "usage comes last");
        texts[chunk.index as usize] += &chunk.text;
        ends += usize::from(chunk.finish_reason() == FinishReason::Stop);
        usage = chunk.usage;
    }
    assert_eq!((texts, ends), (["día".to_owned(), "día".to_owned()], 2));
    assert_eq!(usage.unwrap().completion_tokens, 10);
}

#[tokio::test]
async fn errors_carry_a_typed_detail() {
    let mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    let mut grpc = router.grpc().await;
    let with_sampling = |sampling| GenerateRequest {
        sampling: Some(sampling),
        ..text("x")
    };
    let nan = Sampling {
        temperature: Some(f32::NAN),
        ..Sampling::default()
    };
    let many = Sampling {
        n: Some(17),
        ..Sampling::default()
    };
    let constrained = GenerateRequest {
        constraint: Some(Constraint {
            constraint: Some(constraint::Constraint::Regex("a+".into())),
        }),
        ..text("x")
    };
    let elsewhere = GenerateRequest {
        model: "other".into(),
        ..text("x")
    };
    let named = |id: &str| GenerateRequest {
        request_id: id.into(),
        ..text("x")
    };
    for (request, code, reason, param) in [
        (
            with_sampling(nan),
            Code::InvalidArgument,
            "invalid_value",
            "temperature",
        ),
        (
            with_sampling(many),
            Code::InvalidArgument,
            "invalid_value",
            "n",
        ),
        (
            GenerateRequest::default(),
            Code::InvalidArgument,
            "invalid_value",
            "prompt",
        ),
        (
            text(&"x".repeat(600)),
            Code::InvalidArgument,
            "context_length_exceeded",
            "prompt",
        ),
        (
            constrained,
            Code::Unimplemented,
            "unsupported_parameter",
            "constraint",
        ),
        (elsewhere, Code::NotFound, "model_not_found", "model"),
        (
            named(&"r".repeat(129)),
            Code::InvalidArgument,
            "invalid_value",
            "request_id",
        ),
        (
            named("two lines\n"),
            Code::InvalidArgument,
            "invalid_value",
            "request_id",
        ),
    ] {
        let whole = grpc.generate(request.clone()).await.unwrap_err();
        let streamed = grpc.generate_stream(request).await.unwrap_err();
        for status in [whole, streamed] {
            assert_eq!(status.code(), code, "{status}");
            let detail = detail(&status);
            assert_eq!(
                (detail.code.as_str(), detail.param.as_str()),
                (reason, param)
            );
        }
    }
}

/// A call without tonic's client, which keeps to the timeout itself and gives up first.
async fn raw_call(router: &Router, timeout: &str) -> reqwest::Response {
    let http = reqwest::Client::builder().http2_prior_knowledge();
    let message = text("x").encode_to_vec();
    let mut body = vec![0];
    body.extend((message.len() as u32).to_be_bytes());
    body.extend(message);
    let url = format!("{}/shoal.inference.v1.Inference/Generate", router.base);
    let request = http.build().unwrap().post(url).body(body);
    let request = request.header("content-type", "application/grpc");
    let request = request.header("te", "trailers");
    let request = request.header("grpc-timeout", timeout);
    request.send().await.unwrap()
}

#[tokio::test]
async fn a_grpc_timeout_is_the_deadline() {
    let mut mock = Mock::gated(Script::answer("never")).await;
    let router = Router::ready(&[&mock]).await;
    let response = raw_call(&router, "200m").await;
    let code = response.headers()["grpc-status"].to_str().unwrap();
    assert_eq!(Code::from_bytes(code.as_bytes()), Code::DeadlineExceeded);
    assert!((1..=200).contains(&mock.submitted().await.deadline_in_ms));
    mock.cancelled().await;
}

#[tokio::test]
async fn a_dropped_call_is_cancelled() {
    let mut mock = Mock::gated(Script::answer("abc")).await;
    let router = Router::ready(&[&mock]).await;
    let mut grpc = router.grpc().await;
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (chunks, ()) = tokio::join!(grpc.generate_stream(text("x")), begin);
    let mut chunks = chunks.unwrap().into_inner();
    assert_eq!(chunks.message().await.unwrap().unwrap().text, "a");
    drop(chunks);
    mock.cancelled().await;
    mock.live(0).await;
}

#[tokio::test]
async fn text_tokens_and_models() {
    let mock = Mock::start(Script::answer("")).await;
    let router = Router::ready(&[&mock]).await;
    let mut grpc = router.grpc().await;
    let request = TokenizeRequest {
        text: "<bot>!".into(),
        parse_special: true,
        ..TokenizeRequest::default()
    };
    let ids = grpc.tokenize(request).await.unwrap().into_inner().ids;
    assert_eq!(ids, [258, 33]);
    let request = DetokenizeRequest {
        ids,
        ..DetokenizeRequest::default()
    };
    assert_eq!(
        grpc.detokenize(request).await.unwrap().into_inner().text,
        "<bot>!"
    );
    let models = grpc
        .list_models(ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!((models.len(), models[0].id.as_str()), (1, MODEL));
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let mock = Mock::start(Script::answer("")).await;
    let router = Router::ready(&[&mock]).await;
    let mut client = ServerReflectionClient::new(router.channel().await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let requests = futures::stream::iter([request]);
    let mut answers = client
        .server_reflection_info(requests)
        .await
        .unwrap()
        .into_inner();
    let answer = answers
        .message()
        .await
        .unwrap()
        .unwrap()
        .message_response
        .unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
    for name in ["shoal.inference.v1.Inference", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
}

#[tokio::test]
async fn an_unknown_method_is_unimplemented() {
    let mock = Mock::start(Script::answer("")).await;
    let router = Router::ready(&[&mock]).await;
    let mut client = tonic::client::Grpc::new(router.channel().await);
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/shoal.inference.v1.Inference/Dream");
    let codec = tonic_prost::ProstCodec::<TokenizeRequest, TokenizeRequest>::default();
    let request = tonic::Request::new(TokenizeRequest::default());
    let status = client.unary(request, path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    // It gets no label of its own.
    let route = "/shoal.inference.v1.Inference/{*rest}";
    let name = format!("shoal_requests_total{{route=\"{route}\",code=\"Unimplemented\"}}");
    router.metric_becomes(&name, 1.0).await;
}

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let mock = Mock::gated(Script::answer("abc")).await;
    let router = Router::ready(&[&mock]).await;
    let mut grpc = router.grpc().await;
    let elsewhere = GenerateRequest {
        model: "other".into(),
        ..text("x")
    };
    grpc.generate(elsewhere.clone()).await.unwrap_err();
    grpc.generate_stream(elsewhere).await.unwrap_err();

    // A stream whose client leaves, and one that is read to its end.
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (left, ()) = tokio::join!(grpc.generate_stream(text("x")), begin);
    drop(left);
    mock.live(0).await;
    let begin = async {
        mock.live(1).await;
        mock.step(4);
    };
    let (read, ()) = tokio::join!(grpc.generate_stream(text("x")), begin);
    let mut chunks = read.unwrap().into_inner();
    while chunks.message().await.unwrap().is_some() {}

    for (method, code) in [
        ("Generate", "NotFound"),
        ("GenerateStream", "NotFound"),
        ("GenerateStream", "Cancelled"),
        ("GenerateStream", "Ok"),
    ] {
        let route = format!("/shoal.inference.v1.Inference/{method}");
        let name = format!("shoal_requests_total{{route=\"{route}\",code=\"{code}\"}}");
        router.metric_becomes(&name, 1.0).await;
    }
}
