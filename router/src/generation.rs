//! The tokens of one choice, from whichever workers make them.
//!
//! The prompt, the output so far and the seed are all that a worker needs to go on, and they
//! are kept here. When a worker dies, drains or gives the sequence up, the next attempt
//! carries them to another worker, or to the same one once it is back: the client sees a
//! pause.

mod attempt;

use std::{pin::Pin, sync::Arc, time::Duration};

use shoal_core::TokenId;
use shoal_proto::worker::{Finish, Logprob, RejectReason, SequenceOutput, SequenceUsage};
use tokio::{
    sync::watch,
    time::{Instant, Sleep, sleep_until, timeout},
};
use tracing::{Span, info_span};

use self::attempt::Stay;
use crate::{
    admission::Permit,
    dispatch::Dispatch,
    error::RequestError,
    lead::{Leads, Led},
    placement::Work,
    request::Job,
    session::Event,
};

/// Most that a cancelled sequence's last word may hold its answer up; it takes about a step.
const FAREWELL: Duration = Duration::from_secs(1);

/// New tokens of one choice.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<TokenId>,
    /// One per token, where asked for.
    pub(crate) logprobs: Vec<Logprob>,
    /// One per prompt token, all at once, where asked for.
    pub(crate) prompt_logprobs: Vec<Logprob>,
    pub(crate) end: Option<End>,
}

/// The end of a choice at its worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// By a stop token, which is the last one; else by a limit.
    pub(crate) stopped: bool,
    pub(crate) usage: SequenceUsage,
}

/// One choice of a job. Dropping it cancels it.
#[derive(Debug)]
pub(crate) struct Generation {
    dispatch: Arc<Dispatch>,
    job: Arc<Job>,
    choice: u32,
    work: Work,
    sequence: u64,
    attempt: u32,
    output: Vec<TokenId>,
    prompt_scored: bool,
    /// Attempts that ended since the last new token.
    fruitless: u32,
    moves: u32,
    /// Since when it has had no worker that takes it.
    homeless: Option<Instant>,
    permit: Option<Permit>,
    /// Workers that refused this sequence just now.
    avoid: Vec<Arc<str>>,
    at: Option<Stay>,
    leads: Leads,
    numerics_id: Vec<u8>,
    /// Of the cluster, since it was placed.
    changes: watch::Receiver<()>,
    /// One timer for all waits.
    deadline: Pin<Box<Sleep>>,
    span: Span,
}

impl Generation {
    pub(crate) fn new(
        dispatch: Arc<Dispatch>,
        job: Arc<Job>,
        choice: u32,
        work: Work,
        permit: Permit,
    ) -> Self {
        Self {
            deadline: Box::pin(sleep_until(job.arrival.deadline)),
            sequence: dispatch.begin(),
            span: info_span!("generation", choice),
            changes: dispatch.cluster.watch(),
            dispatch,
            job,
            choice,
            work,
            attempt: 0,
            output: Vec::new(),
            prompt_scored: false,
            fruitless: 0,
            moves: 0,
            homeless: None,
            permit: Some(permit),
            avoid: Vec::new(),
            at: None,
            leads: Leads::default(),
            numerics_id: Vec::new(),
        }
    }

    /// Waits for new tokens or the end. Not to be called after the end.
    pub(crate) async fn next(&mut self) -> Result<Tokens, RequestError> {
        loop {
            let Some(stay) = &mut self.at else {
                let placement = self.dispatch.metrics.stages.placement.clone();
                let span = info_span!(parent: &self.span, "placement", attempt = self.attempt);
                placement.run(span, self.attach()).await?;
                continue;
            };
            let event = tokio::select! {
                biased;
                event = stay.attachment.next() => event,
                event = self.leads.next() => {
                    let draft = self.leads.hear(event, &self.job.prompt, &self.output);
                    if let Some(draft) = draft {
                        stay.attachment.draft(draft);
                    }
                    continue;
                }
                Ok(()) = self.changes.changed(), if !stay.proven => {
                    self.reconsider();
                    continue;
                }
                () = self.deadline.as_mut() => return Err(RequestError::Deadline),
            };
            match event {
                Event::Output(output) => {
                    let news = self.accept(output)?;
                    if !news.tokens.is_empty()
                        || !news.prompt_logprobs.is_empty()
                        || news.end.is_some()
                    {
                        return Ok(news);
                    }
                }
                Event::Rejected(RejectReason::Invalid, message) => {
                    return Err(RequestError::Refused { message });
                }
                Event::Rejected(reason, _) => {
                    let worker = stay.address.clone();
                    tracing::debug!(%worker, reason = reason.as_str_name(), "submission refused");
                    self.avoid.push(worker);
                    self.detach();
                    // One that only moved while it waited never ran either.
                    let never_ran = self.output.is_empty() && self.fruitless == 0;
                    if reason == RejectReason::Overloaded && never_ran {
                        self.must_fit_elsewhere()?;
                    }
                }
                Event::Lost => self.lose()?,
            }
        }
    }

    /// Takes what is new of an output.
    fn accept(&mut self, output: SequenceOutput) -> Result<Tokens, RequestError> {
        let finish = output.finish();
        let Some(known) = self.output.len().checked_sub(output.output_offset as usize) else {
            tracing::warn!(
                offset = output.output_offset,
                have = self.output.len(),
                "the worker left tokens out"
            );
            self.blame();
            self.lose()?;
            return Ok(Tokens::default());
        };
        let mut news = Tokens {
            tokens: output.tokens,
            logprobs: output.logprobs,
            ..Tokens::default()
        };
        if known > 0 {
            news.tokens.drain(..known.min(news.tokens.len()));
            news.logprobs.drain(..known.min(news.logprobs.len()));
        }
        if !news.tokens.is_empty() {
            self.fruitless = 0;
            self.homeless = None;
            if let Some(stay) = self.at.as_mut().filter(|stay| !stay.proven) {
                stay.proven = true;
                stay.pass.succeed();
            }
            self.avoid.clear();
            self.output.extend_from_slice(&news.tokens);
            self.be_led(&news.tokens);
        }
        if let Some(stay) = self.at.as_mut().filter(|_| !self.prompt_scored) {
            stay.prompt_scores.extend(output.prompt_logprobs);
            if stay.prompt_scores.len() >= self.job.prompt.len() {
                self.prompt_scored = true;
                news.prompt_logprobs = std::mem::take(&mut stay.prompt_scores);
            }
        }
        match finish {
            Finish::Unspecified => {}
            Finish::Stop | Finish::Length => {
                self.at = None;
                self.leads.end();
                self.learn();
                news.end = Some(End {
                    stopped: finish == Finish::Stop,
                    usage: output.usage.unwrap_or_default(),
                });
            }
            Finish::Deadline => return Err(RequestError::Deadline),
            // This router did not cancel it: the worker gave it up.
            Finish::Cancelled | Finish::Preempted => {
                self.blame();
                self.lose()?;
            }
        }
        Ok(news)
    }

    /// Tells its draft worker of new tokens.
    fn be_led(&mut self, made: &[TokenId]) {
        let Some(stay) = &self.at else { return };
        let led = Led {
            job: &self.job,
            choice: self.choice,
            sequence: self.sequence,
            output: &self.output,
        };
        let Dispatch {
            cluster, metrics, ..
        } = &*self.dispatch;
        self.leads
            .follow(cluster, metrics, &stay.connected, led, made);
    }

    /// Its answer is complete: it drafts for later ones.
    fn learn(&self) {
        self.dispatch.cluster.corpora.learn(&self.job, &self.output);
    }

    /// Ends it at the worker, complete as it is, and returns what it cost, as far as the worker
    /// says so in time.
    pub(crate) async fn cancel(&mut self) -> SequenceUsage {
        let Some(Stay { attachment, .. }) = &self.at else {
            return SequenceUsage::default();
        };
        self.learn();
        attachment.cancel();
        let farewell = async {
            loop {
                match attachment.next().await {
                    Event::Output(output) => {
                        if let Some(usage) = output.usage {
                            return usage;
                        }
                    }
                    Event::Rejected(..) | Event::Lost => return SequenceUsage::default(),
                }
            }
        };
        timeout(FAREWELL, farewell).await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
