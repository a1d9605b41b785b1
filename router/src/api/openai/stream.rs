//! Server-sent events, as OpenAI streams them.

use std::{borrow::Cow, sync::Arc};

use axum::{body::Body, response::Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use http::{HeaderValue, header};
use serde::Serialize;

use super::{
    Answers,
    response::{
        ChatDelta, ChatLogprobs, Chunk, Delta, TextChoice, TextLogprobs, Usage, finish_name,
    },
    scored,
};
use crate::{
    answer::Growth, api::error::ErrorBody, error::RequestError, model::unix_seconds, request::Job,
    service::Service,
};

/// How a growth looks as chunks.
pub(super) trait Form: Send + 'static {
    /// Prefix of the answer's id.
    const PREFIX: &'static str;
    /// The chunks' object type.
    const OBJECT: &'static str;

    /// Writes the chunks of one growth.
    fn write(&mut self, growth: &Growth, first: bool, out: &mut Events);
}

/// `/v1/chat/completions`.
pub(super) struct Chat;

impl Form for Chat {
    const PREFIX: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion.chunk";

    fn write(&mut self, growth: &Growth, first: bool, out: &mut Events) {
        let chunk = |delta, logprobs, finish_reason| ChatDelta {
            index: growth.index,
            delta,
            logprobs,
            finish_reason,
        };
        if first {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(""),
            };
            out.chunk(&[chunk(delta, None, None)], false);
        }
        if !growth.text.is_empty() || !growth.logprobs.is_empty() {
            let delta = Delta {
                role: None,
                content: Some(&growth.text),
            };
            let logprobs = scored(&out.job).then(|| ChatLogprobs::new(&growth.logprobs));
            out.chunk(&[chunk(delta, logprobs, None)], false);
        }
        if let Some(finish) = growth.finish {
            out.chunk(&[chunk(Delta::default(), None, finish_name(finish))], true);
        }
    }
}

/// `/v1/completions`.
pub(super) struct Text {
    /// Characters of each choice so far.
    offsets: Vec<usize>,
}

impl Text {
    pub(super) fn new(answers: &Answers) -> Self {
        Self {
            offsets: vec![0; answers.choices()],
        }
    }
}

impl Form for Text {
    const PREFIX: &'static str = "cmpl";
    const OBJECT: &'static str = "text_completion";

    fn write(&mut self, growth: &Growth, _: bool, out: &mut Events) {
        let Some(offset) = self.offsets.get_mut(growth.index as usize) else {
            return;
        };
        let nothing = growth.text.is_empty() && growth.logprobs.is_empty();
        if nothing && growth.finish.is_none() {
            return;
        }
        let choice = TextChoice {
            text: Cow::Borrowed(&growth.text),
            index: growth.index,
            logprobs: scored(&out.job).then(|| TextLogprobs::new(&growth.logprobs, offset)),
            finish_reason: growth.finish.and_then(finish_name),
        };
        out.chunk(&[choice], growth.finish.is_some());
    }
}

/// The event stream that is written.
pub(super) struct Events {
    job: Arc<Job>,
    id: String,
    object: &'static str,
    created: u64,
    include_usage: bool,
    buffer: BytesMut,
}

/// Room for a usual chunk, so that one allocation serves many.
const BUFFER: usize = 16 << 10;

impl Events {
    /// Writes a chunk; a choice's last one carries the seed.
    fn chunk<C: Serialize>(&mut self, choices: &[C], last: bool) {
        let seed = last.then_some(self.job.seed);
        self.write(choices, self.include_usage.then_some(None), seed);
    }

    /// The end: usage, where asked for, in a chunk without choices.
    fn end(&mut self, usage: Usage) {
        if self.include_usage {
            self.write::<()>(&[], Some(Some(usage)), Some(self.job.seed));
        }
        self.buffer.put_slice(b"data: [DONE]\n\n");
    }

    fn write<C: Serialize>(
        &mut self,
        choices: &[C],
        usage: Option<Option<Usage>>,
        seed: Option<u64>,
    ) {
        let chunk = Chunk {
            id: &self.id,
            object: self.object,
            created: self.created,
            model: &self.job.model.name,
            choices,
            usage,
            seed,
        };
        event(&mut self.buffer, &chunk);
    }

    fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }
}

/// Writes one event.
fn event(buffer: &mut BytesMut, data: &impl Serialize) {
    buffer.put_slice(b"data: ");
    // Memory takes everything, and these types have nothing that JSON cannot say.
    if let Err(error) = serde_json::to_writer((&mut *buffer).writer(), data) {
        tracing::error!(%error, "event not written");
    }
    buffer.put_slice(b"\n\n");
}

/// Answers with the stream of the growths.
pub(super) fn respond<F: Form>(
    service: Arc<Service>,
    answers: Answers,
    form: F,
    include_usage: bool,
) -> Response {
    let job = answers.jobs[0].clone();
    let events = Events {
        id: format!("{}-{}", F::PREFIX, job.arrival.request_id),
        object: F::OBJECT,
        created: unix_seconds(),
        job,
        include_usage,
        buffer: BytesMut::with_capacity(BUFFER),
    };
    let body = Body::from_stream(frames(service, answers, form, events));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would hold tokens back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn frames<F: Form>(
    service: Arc<Service>,
    mut answers: Answers,
    mut form: F,
    mut events: Events,
) -> impl Stream<Item = Result<Bytes, RequestError>> + Send {
    async_stream::stream! {
        let mut begun = vec![false; answers.choices()];
        let mut usage = Usage::default();
        while let Some(growth) = answers.growths.next().await {
            let growth = match growth {
                Ok(growth) => growth,
                Err(error) => {
                    service.metrics.rejected(error.code());
                    event(&mut events.buffer, &ErrorBody::from(&error));
                    yield Ok(events.take());
                    return;
                }
            };
            if let Some(part) = &growth.usage {
                usage.add(part);
            }
            let begun = begun.get_mut(growth.index as usize);
            let first = begun.is_some_and(|begun| !std::mem::replace(begun, true));
            form.write(&growth, first, &mut events);
            if !events.buffer.is_empty() {
                yield Ok(events.take());
            }
        }
        events.end(usage);
        yield Ok(events.take());
    }
}
