//! A router on a real socket before mock workers, and a client.

use std::time::Duration;

use serde_json::{Value, json};
use shoal_fabric::shutdown::Shutdown;
use shoal_proto::inference::inference_client::InferenceClient;
use shoal_router::{RouterArgs, Server};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::mock::Mock;

pub(crate) struct Router {
    pub(crate) base: String,
    pub(crate) http: reqwest::Client,
    pub(crate) shutdown: Shutdown,
    served: JoinHandle<()>,
}

/// Settings for these workers.
pub(crate) fn args(mocks: &[&Mock]) -> RouterArgs {
    RouterArgs {
        listen: ([127, 0, 0, 1], 0).into(),
        workers: mocks.iter().map(|mock| mock.address.to_string()).collect(),
        ..RouterArgs::default()
    }
}

impl Router {
    /// Starts a router and waits until a worker is ready.
    pub(crate) async fn ready(mocks: &[&Mock]) -> Self {
        Self::ready_with(args(mocks)).await
    }

    pub(crate) async fn ready_with(args: RouterArgs) -> Self {
        let router = Self::start(args).await;
        router.becomes(ServingStatus::Serving).await;
        router
    }

    pub(crate) async fn start(args: RouterArgs) -> Self {
        let server = Server::bind(args.try_into().unwrap()).await.unwrap();
        let base = format!("http://{}", server.local_addr().unwrap());
        let shutdown = Shutdown::new();
        let serving = server.serve(shutdown.clone());
        Self {
            base,
            http: reqwest::Client::new(),
            shutdown,
            served: tokio::spawn(async move { serving.await.unwrap() }),
        }
    }

    /// Waits until the router is ready, or no longer is.
    pub(crate) async fn becomes(&self, status: ServingStatus) {
        let mut health = HealthClient::new(self.channel().await);
        let request = HealthCheckRequest::default();
        let mut states = health.watch(request).await.unwrap().into_inner();
        while states.message().await.unwrap().unwrap().status() != status {}
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(self.base.clone())
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    pub(crate) async fn grpc(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel().await)
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> reqwest::Response {
        let request = self.http.post(format!("{}{path}", self.base)).json(&body);
        request.send().await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let response = self
            .http
            .get(format!("{}{path}", self.base))
            .send()
            .await
            .unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// A request that must succeed.
    pub(crate) async fn ok(&self, path: &str, body: Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let body: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{body}");
        body
    }

    /// A request that must fail: status and error object.
    pub(crate) async fn error(&self, path: &str, body: Value) -> (u16, Value) {
        error_of(self.post(path, body).await).await
    }

    pub(crate) async fn chat(&self, fields: Value) -> Value {
        self.ok("/v1/chat/completions", chat_body(fields)).await
    }

    /// Starts a streamed chat.
    pub(crate) async fn stream(&self, fields: Value) -> Events {
        let mut body = chat_body(fields);
        body["stream"] = true.into();
        self.events("/v1/chat/completions", body).await
    }

    pub(crate) async fn events(&self, path: &str, body: Value) -> Events {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Events {
            response: Some(response),
            buffer: Vec::new(),
        }
    }

    /// The value of a metric without labels, or with exactly these.
    pub(crate) async fn metric(&self, name: &str) -> Option<f64> {
        let url = format!("{}/metrics", self.base);
        let text = self
            .http
            .get(url)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(|value| value.parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub(crate) async fn metric_becomes(&self, name: &str, value: f64) {
        let wait = async { while self.metric(name).await != Some(value) {} };
        let reached = tokio::time::timeout(Duration::from_secs(30), wait).await;
        assert!(reached.is_ok(), "{name} never became {value}");
    }

    /// Shuts down and waits for the end.
    pub(crate) async fn stop(self) {
        self.shutdown.start();
        self.served.await.unwrap();
        assert!(
            self.shutdown.finished(Duration::from_secs(10)).await,
            "a task was left"
        );
    }
}

/// Status and error object of a response.
pub(crate) async fn error_of(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    let error = body["error"].clone();
    for field in ["message", "type", "code"] {
        assert!(error[field].is_string(), "{field} in {body}");
    }
    assert!(error.as_object().unwrap().contains_key("param"), "{body}");
    (status, error)
}

/// A chat with one message and these fields besides.
pub(crate) fn chat_body(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let object = body.as_object_mut().unwrap();
    object.extend(fields.as_object().unwrap().clone());
    body
}

/// The text of a whole chat answer.
pub(crate) fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// Server-sent events as they come.
pub(crate) struct Events {
    response: Option<reqwest::Response>,
    buffer: Vec<u8>,
}

impl Events {
    /// The data of the next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let text = String::from_utf8(event).unwrap();
                let data = text
                    .strip_prefix("data: ")
                    .unwrap()
                    .strip_suffix("\n\n")
                    .unwrap();
                assert!(!data.contains('\n'), "one line per event");
                return Some(data.to_owned());
            }
            let chunk = self.response.as_mut()?.chunk().await.unwrap();
            let Some(chunk) = chunk else {
                assert!(self.buffer.is_empty(), "the stream ends between events");
                return None;
            };
            self.buffer.extend_from_slice(&chunk);
        }
    }

    /// The next event's JSON.
    pub(crate) async fn chunk(&mut self) -> Value {
        serde_json::from_str(&self.next().await.unwrap()).unwrap()
    }

    /// The next chunk that carries text.
    pub(crate) async fn text(&mut self) -> String {
        loop {
            let event = self.chunk().await;
            match event["choices"][0]["delta"]["content"].as_str() {
                None | Some("") => {}
                Some(text) => return text.to_owned(),
            }
        }
    }

    /// All chunks up to `[DONE]`, which must be the last event.
    pub(crate) async fn rest(mut self) -> Vec<Value> {
        let mut chunks = Vec::new();
        loop {
            let data = self.next().await.expect("[DONE] before the end");
            if data == "[DONE]" {
                assert_eq!(self.next().await, None);
                return chunks;
            }
            chunks.push(serde_json::from_str(&data).unwrap());
        }
    }
}

/// The streamed text of one choice.
pub(crate) fn joined(chunks: &[Value], index: u64) -> String {
    let choices = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|c| c["delta"]["content"].as_str().or(c["text"].as_str()))
        .collect()
}
