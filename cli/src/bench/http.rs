//! Load over OpenAI's HTTP API, with server-sent events.

use std::time::Instant;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::prompts::Prompt;
use super::report::{Counts, Record, Stopwatch};
use super::{BenchError, ServeArgs};

/// Longest line of an event stream, and most of an error that is shown.
const MAX_LINE: usize = 1 << 20;
const MAX_ERROR: usize = 4096;

/// A server.
pub(super) struct Target {
    /// `host:port`.
    address: String,
    base: String,
    authorization: Option<String>,
    /// Every request, but for its prompt.
    body: Value,
}

/// What of an event counts here.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

impl Event {
    fn has_text(&self) -> bool {
        let filled = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        self.choices.iter().any(|choice| {
            filled(&choice.text) || choice.delta.as_ref().is_some_and(|d| filled(&d.content))
        })
    }
}

impl Target {
    pub(super) fn new(args: &ServeArgs) -> Result<Self, BenchError> {
        let url = &args.client.url;
        let wrong = || BenchError::Url { url: url.clone() };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong());
        }
        let base = uri.path().trim_end_matches('/');
        let key = args.client.api_key.as_ref();
        Ok(Self {
            address: format!(
                "{}:{}",
                authority.host(),
                authority.port_u16().unwrap_or(80)
            ),
            base: base.strip_suffix("/v1").unwrap_or(base).to_owned(),
            authorization: key.map(|key| format!("Bearer {key}")),
            body: json!({
                "model": args.model,
                "max_tokens": args.max_tokens,
                "temperature": args.temperature,
                "seed": args.seed,
                "ignore_eos": args.ignore_eos,
                "stream": true,
                "stream_options": {"include_usage": true},
            }),
        })
    }

    pub(super) async fn ask(&self, prompt: &Prompt) -> Result<Record, BenchError> {
        let mut watch = Stopwatch::start();
        let response = self.send(self.request(prompt)?).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let text = Limited::new(body, MAX_ERROR).collect().await;
            let text = text.map(|text| text.to_bytes()).unwrap_or_default();
            return Err(BenchError::Status {
                status: status.as_u16(),
                body: String::from_utf8_lossy(&text).into_owned(),
            });
        }
        let mut lines = Lines::default();
        let mut counts = None;
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else {
                continue;
            };
            let now = Instant::now();
            lines.push(&data)?;
            while let Some(line) = lines.next() {
                let Some(event) = parse(&line)? else {
                    continue;
                };
                if let Some(error) = event.error {
                    return Err(BenchError::InBand(error.to_string()));
                }
                if event.has_text() {
                    watch.text(now);
                }
                counts = event.usage.map(Counts::from).or(counts);
            }
        }
        watch.finish(Instant::now(), counts)
    }

    fn request(&self, prompt: &Prompt) -> Result<Request<Full<Bytes>>, BenchError> {
        let mut body = self.body.clone();
        let path = match prompt {
            Prompt::Chat { messages } => {
                body["messages"] = json!(messages);
                "chat/completions"
            }
            Prompt::Text { prompt } => {
                body["prompt"] = json!(prompt);
                "completions"
            }
        };
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/v1/{path}", self.base))
            .header(HOST, &self.address)
            .header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        Ok(request.body(Full::from(serde_json::to_vec(&body)?))?)
    }

    /// On a connection of its own, as most clients of such servers do.
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, BenchError> {
        let connect = |source| BenchError::Connect {
            address: self.address.clone(),
            source,
        };
        let stream = TcpStream::connect(&self.address).await.map_err(connect)?;
        stream.set_nodelay(true).map_err(connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its failures show in the response as well.
        tokio::spawn(connection);
        Ok(sender.send_request(request).await?)
    }
}

impl From<Usage> for Counts {
    fn from(usage: Usage) -> Self {
        let cached = usage.prompt_tokens_details.and_then(|d| d.cached_tokens);
        Self {
            prompt: usage.prompt_tokens,
            completion: usage.completion_tokens,
            cached: cached.unwrap_or_default(),
        }
    }
}

/// The event of a line, if it is one.
fn parse(line: &[u8]) -> Result<Option<Event>, BenchError> {
    match line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) {
        None | Some(b"[DONE]") => Ok(None),
        Some(data) => Ok(Some(serde_json::from_slice(data)?)),
    }
}

/// Cuts a byte stream into lines.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    fn push(&mut self, data: &[u8]) -> Result<(), BenchError> {
        if self.buffer.len() + data.len() > MAX_LINE {
            return Err(BenchError::Line(MAX_LINE));
        }
        self.buffer.extend_from_slice(data);
        Ok(())
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let end = self.buffer.iter().position(|&byte| byte == b'\n')?;
        let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
        line.truncate(line.trim_ascii_end().len());
        Some(line)
    }
}
