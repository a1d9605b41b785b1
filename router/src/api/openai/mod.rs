//! OpenAI's `/v1/chat/completions` and `/v1/completions`: adapters onto the one request path.

mod request;
mod response;
mod stream;

use std::{borrow::Cow, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use futures::{StreamExt, TryStreamExt, future::try_join_all, stream::BoxStream};
use serde::Serialize;
use shoal_proto::inference::GenerateRequest;

use self::{
    request::Body,
    response::{
        ChatChoice, ChatLogprobs, ChatMessage, Completion, TextChoice, TextLogprobs, Usage, Whole,
        finish_name,
    },
};
use super::{body::JsonBody, context::Authorized};
use crate::{
    answer::{Answer, Growth},
    error::RequestError,
    merge::Merge,
    model::unix_seconds,
    request::{Arrival, Job},
    service::Service,
};

/// `POST /v1/chat/completions`
pub(super) async fn chat(
    State(service): State<Arc<Service>>,
    Authorized(context): Authorized,
    JsonBody(body): JsonBody<Body>,
) -> Result<Response, RequestError> {
    let arrival = context.arrival(None, &service)?;
    note_user(&body);
    let (stream, include_usage) = (body.stream == Some(true), body.include_usage());
    let requests = vec![body.into_chat()?];
    let answers = Answers::start(&service, requests, arrival).await?;
    if stream {
        return Ok(stream::respond(
            service,
            answers,
            stream::Chat,
            include_usage,
        ));
    }
    answers
        .whole("chatcmpl", "chat.completion", |job, index, whole| {
            ChatChoice {
                index,
                logprobs: scored(job).then(|| ChatLogprobs::new(&whole.logprobs)),
                finish_reason: finish_name(whole.finish),
                message: ChatMessage {
                    role: "assistant",
                    content: whole.text,
                    refusal: None,
                },
            }
        })
        .await
}

/// `POST /v1/completions`
pub(super) async fn completions(
    State(service): State<Arc<Service>>,
    Authorized(context): Authorized,
    JsonBody(body): JsonBody<Body>,
) -> Result<Response, RequestError> {
    let arrival = context.arrival(None, &service)?;
    note_user(&body);
    let (stream, include_usage) = (body.stream == Some(true), body.include_usage());
    let requests = body.into_completions(service.has_default_max_tokens())?;
    let answers = Answers::start(&service, requests, arrival).await?;
    if stream {
        let form = stream::Text::new(&answers);
        return Ok(stream::respond(service, answers, form, include_usage));
    }
    answers
        .whole("cmpl", "text_completion", |job, index, whole| TextChoice {
            index,
            logprobs: scored(job).then(|| TextLogprobs::new(&whole.logprobs, &mut 0)),
            finish_reason: finish_name(whole.finish),
            text: Cow::Owned(whole.text),
        })
        .await
}

fn note_user(body: &Body) {
    if let Some(user) = body.user() {
        tracing::debug!(end_user = user, "end user");
    }
}

fn scored(job: &Job) -> bool {
    job.scoring.output_top.is_some()
}

/// The answers to the prompts of one HTTP request; choices are numbered through.
struct Answers {
    /// In the order of the prompts; never empty.
    jobs: Vec<Arc<Job>>,
    growths: Merge<BoxStream<'static, Result<Growth, RequestError>>>,
}

impl Answers {
    async fn start(
        service: &Service,
        requests: Vec<GenerateRequest>,
        arrival: Arrival,
    ) -> Result<Self, RequestError> {
        let started = requests
            .into_iter()
            .map(|r| service.generate(r, arrival.clone()));
        let answers: Vec<Answer> = try_join_all(started).await?;
        let jobs: Vec<Arc<Job>> = answers.iter().map(|answer| answer.job.clone()).collect();
        let mut first = 0;
        let numbered = answers.into_iter().map(|answer| {
            let offset = first;
            first += answer.job.choices;
            let growths = answer.into_stream();
            growths
                .map_ok(move |growth| Growth {
                    index: growth.index + offset,
                    ..growth
                })
                .boxed()
        });
        Ok(Self {
            growths: numbered.collect(),
            jobs,
        })
    }

    fn choices(&self) -> usize {
        self.jobs.iter().map(|job| job.choices as usize).sum()
    }

    /// Waits for all of it and answers with one JSON object.
    async fn whole<C: Serialize>(
        mut self,
        prefix: &str,
        object: &'static str,
        choice: impl Fn(&Job, u32, Whole) -> C,
    ) -> Result<Response, RequestError> {
        let mut wholes = vec![Whole::default(); self.choices()];
        let mut usage = Usage::default();
        while let Some(growth) = self.growths.try_next().await? {
            if let Some(part) = &growth.usage {
                usage.add(part);
            }
            if let Some(whole) = wholes.get_mut(growth.index as usize) {
                whole.add(growth);
            }
        }
        let job = &self.jobs[0];
        let choices = (0..)
            .zip(wholes)
            .map(|(index, whole)| choice(job, index, whole));
        let body = Completion {
            id: &format!("{prefix}-{}", job.arrival.request_id),
            object,
            created: unix_seconds(),
            model: &job.model.name,
            choices: choices.collect(),
            usage,
            seed: job.seed,
        };
        Ok(Json(body).into_response())
    }
}
