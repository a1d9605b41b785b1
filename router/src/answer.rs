//! The answer to a request: its choices as they grow, counted and measured.

use std::sync::Arc;

use futures::{Stream, StreamExt, stream::BoxStream};
use shoal_proto::{
    inference::{FinishReason, TokenLogprob, Usage},
    worker::SequenceUsage,
};
use tokio::time::Instant;
use tracing::Span;

use crate::{
    admission::Permit, dispatch::Dispatch, error::RequestError, generation::Generation,
    keys::TenantGuard, merge::Merge, metrics::ModelMetrics, output::Output, placement::Work,
    request::Job, service::Open,
};

/// New text of one choice. All fields may be empty; the last one of a choice has a finish
/// reason, and the last one of an answer its usage.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Growth {
    pub(crate) index: u32,
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) finish: Option<FinishReason>,
    /// The stop string that ended the choice.
    pub(crate) stop: Option<String>,
    pub(crate) usage: Option<Usage>,
}

/// What a choice's stream yields.
struct Step {
    growth: Growth,
    completion_tokens: u32,
    cached_tokens: u32,
}

/// A running answer. Dropping it cancels what still runs.
pub(crate) struct Answer {
    pub(crate) job: Arc<Job>,
    choices: Merge<BoxStream<'static, Result<Step, RequestError>>>,
    first: Option<Growth>,
    /// Choices without their end.
    unfinished: u32,
    usage: Usage,
    meter: Meter,
    open: Open,
}

impl Answer {
    /// Starts every choice and waits for the first news, so that a refusal comes as an error
    /// here and not in the middle of a stream.
    pub(crate) async fn start(
        dispatch: &Arc<Dispatch>,
        job: Arc<Job>,
        work: Work,
        permits: Vec<Permit>,
        tenant: TenantGuard,
        open: Open,
    ) -> Result<Self, RequestError> {
        let metrics = dispatch.metrics.model(job.model.name.clone());
        let prompt_tokens = job.prompt.len() as u32;
        metrics
            .queue_time
            .observe(job.arrival.at.elapsed().as_secs_f64());
        metrics.prompt_tokens.inc_by(prompt_tokens.into());
        tenant.charge(prompt_tokens);
        let unfinished = job.choices;
        let choices = (0..).zip(permits).map(|(choice, permit)| {
            let generation = Generation::new(dispatch.clone(), job.clone(), choice, work, permit);
            Ok(grow(choice, generation, Output::new(&job)?).boxed())
        });
        let choices = choices.collect::<Result<_, RequestError>>()?;
        let mut answer = Self {
            meter: Meter {
                job: job.clone(),
                metrics,
                dispatch: dispatch.clone(),
                tenant,
                span: Span::current(),
                last: vec![None; unfinished as usize],
                usage: Usage::default(),
                done: false,
            },
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            job,
            choices,
            first: None,
            unfinished,
            open,
        };
        answer.first = answer.next().await.transpose()?;
        Ok(answer)
    }

    /// The next growth; `None` after the last one, and after an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Growth, RequestError>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        let Step {
            mut growth,
            completion_tokens,
            cached_tokens,
        } = match self.step().await? {
            Ok(step) => step,
            Err(error) => {
                self.choices = Merge::Ended;
                return Some(Err(error));
            }
        };
        self.meter.tokens(growth.index, completion_tokens);
        self.usage.completion_tokens += completion_tokens;
        if growth.index == 0 {
            // The other choices find the first one's prompt in the cache.
            self.usage.cached_tokens = cached_tokens;
        }
        if growth.finish.is_some() {
            self.unfinished -= 1;
            if self.unfinished == 0 {
                growth.usage = Some(self.usage);
                self.meter.finish(self.usage);
            }
        }
        Some(Ok(growth))
    }

    async fn step(&mut self) -> Option<Result<Step, RequestError>> {
        tokio::select! {
            biased;
            step = self.choices.next() => step,
            () = &mut self.open.cut => Some(Err(RequestError::Draining)),
        }
    }

    /// As a stream.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<Growth, RequestError>> + Send {
        futures::stream::unfold(self, |mut answer| async {
            let growth = answer.next().await?;
            Some((growth, answer))
        })
    }
}

/// One choice, from its first token to its end.
fn grow(
    index: u32,
    mut generation: Generation,
    mut output: Output,
) -> impl Stream<Item = Result<Step, RequestError>> + Send {
    async_stream::try_stream! {
        loop {
            let tokens = generation.next().await?;
            let end = tokens.end;
            let before = output.completion_tokens();
            let mut growth = output.push(index, tokens);
            let mut completion_tokens = output.completion_tokens() - before;
            let finished = growth.finish.is_some();
            let usage = match end {
                Some(end) => end.usage,
                None if finished => {
                    // By a stop string. The text goes out while the worker ends it, too.
                    let last = Growth {
                        index,
                        finish: growth.finish.take(),
                        stop: growth.stop.take(),
                        ..Growth::default()
                    };
                    yield Step {
                        growth: std::mem::replace(&mut growth, last),
                        completion_tokens: std::mem::take(&mut completion_tokens),
                        cached_tokens: 0,
                    };
                    generation.cancel().await
                }
                None => SequenceUsage::default(),
            };
            yield Step {
                growth,
                completion_tokens,
                cached_tokens: usage.cached_tokens,
            };
            if finished {
                break;
            }
        }
    }
}

/// Measures an answer and settles its account, also when its client leaves early.
struct Meter {
    job: Arc<Job>,
    metrics: ModelMetrics,
    dispatch: Arc<Dispatch>,
    tenant: TenantGuard,
    span: Span,
    /// When each choice grew last.
    last: Vec<Option<Instant>>,
    usage: Usage,
    done: bool,
}

impl Meter {
    fn tokens(&mut self, index: u32, tokens: u32) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        let first = self.last.iter().all(Option::is_none);
        if first {
            let time = now.duration_since(self.job.arrival.at);
            self.metrics.time_to_first_token.observe(time.as_secs_f64());
        }
        if let Some(last) = self.last.get_mut(index as usize)
            && let Some(before) = last.replace(now)
        {
            let time = now.duration_since(before).as_secs_f64() / f64::from(tokens);
            self.metrics.inter_token.observe(time);
        }
        self.usage.completion_tokens += tokens;
    }

    fn finish(&mut self, usage: Usage) {
        self.done = true;
        self.usage = usage;
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let time = self.job.arrival.at.elapsed().as_secs_f64();
        let tokens = self.usage.completion_tokens;
        self.tenant.charge(tokens);
        self.metrics.output_tokens.inc_by(tokens.into());
        if self.done {
            self.metrics.end_to_end.observe(time);
            self.metrics
                .cached_tokens
                .inc_by(self.usage.cached_tokens.into());
            self.dispatch.admission.learn(tokens / self.job.choices);
        } else {
            self.metrics.abandoned.inc();
        }
        tracing::info!(
            parent: &self.span,
            seed = self.job.seed,
            prompt_tokens = self.job.prompt.len(),
            completion_tokens = tokens,
            seconds = time,
            complete = self.done,
            "answered"
        );
    }
}
