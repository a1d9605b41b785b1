//! The tokens of one choice, from whichever workers make them.
//!
//! The prompt, the output so far and the seed are all that a worker needs to go on, and they
//! are kept here. When a worker dies, drains or gives the sequence up, the next attempt
//! carries them to another worker, or to the same one once it is back: the client sees a
//! pause.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use shoal_core::{DraftScope, Speculation, TokenId};
use shoal_fabric::telemetry;
use shoal_proto::worker::{Finish, Logprob, RejectReason, SequenceOutput, SequenceUsage, Submit};
use tokio::{
    sync::watch,
    time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at},
};
use tracing::{Span, info_span};

use crate::{
    admission::{Admission, Permit},
    breaker::Pass,
    cluster::Cluster,
    error::RequestError,
    lead::{Leads, Led},
    metrics::Metrics,
    pages::Coming,
    place::{Place, Wanted},
    placement::{Routing, Work},
    request::Job,
    retry::RetryBudget,
    session::{Attachment, Closed, Event},
    worker::Connected,
};

/// Attempts without a new token after which a sequence counts as the cause of its losses.
const MAX_FRUITLESS: u32 = 4;
/// Times that a sequence moves while it waits, lest it does nothing else.
const MAX_MOVES: u32 = 4;
/// Between tries where every worker refuses a sequence that was running.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Most that a cancelled sequence's last word may hold its answer up; it takes about a step.
const FAREWELL: Duration = Duration::from_secs(1);

/// What every generation needs.
#[derive(Debug)]
pub(crate) struct Dispatch {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) metrics: Metrics,
    pub(crate) resume_window: Duration,
    retries: RetryBudget,
    sequences: AtomicU64,
}

impl Dispatch {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        admission: Arc<Admission>,
        metrics: Metrics,
        resume_window: Duration,
    ) -> Self {
        Self {
            cluster,
            admission,
            metrics,
            resume_window,
            retries: RetryBudget::new(),
            sequences: AtomicU64::new(1),
        }
    }

    /// Whether the retry budget holds one more.
    fn may_retry(&self) -> bool {
        let granted = self.retries.withdraw();
        if !granted {
            self.metrics.refused_retries.inc();
        }
        granted
    }

    /// When a worker is predicted to have room again.
    fn retry_after(&self) -> Duration {
        let throughput = self.cluster.throughput();
        throughput.drain_time(&self.admission.backlog())
    }
}

/// New tokens of one choice.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<TokenId>,
    /// One per token, where asked for.
    pub(crate) logprobs: Vec<Logprob>,
    /// One per prompt token, once, where asked for.
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

/// An attempt at a worker.
#[derive(Debug)]
struct Stay {
    attachment: Attachment,
    address: Arc<str>,
    connected: Arc<Connected>,
    pass: Pass,
    /// It has had output here.
    proven: bool,
    /// Tokens to prefill when it came.
    uncached: u64,
    _coming: Coming,
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
        dispatch.retries.deposit();
        Self {
            deadline: Box::pin(sleep_until(job.arrival.deadline)),
            sequence: dispatch.sequences.fetch_add(1, Ordering::Relaxed),
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
                    if reason == RejectReason::Overloaded && self.attempt == 0 {
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
        if !self.prompt_scored && !output.prompt_logprobs.is_empty() {
            self.prompt_scored = true;
            news.prompt_logprobs = output.prompt_logprobs;
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

    fn detach(&mut self) {
        if let Some(stay) = self.at.take() {
            self.permit = stay.attachment.take_permit();
        }
    }

    /// The worker failed it, unless it said that it takes nothing more.
    fn blame(&mut self) {
        if let Some(stay) = &mut self.at
            && stay.connected.is_ready()
        {
            stay.pass.fail();
        }
    }

    /// The worker is gone, or has given the sequence up.
    fn lose(&mut self) -> Result<(), RequestError> {
        self.detach();
        self.fruitless += 1;
        // A stream that got on is never refused its next worker; one that did not is a retry.
        let refused = self.fruitless > 1 && !self.dispatch.may_retry();
        if self.fruitless >= MAX_FRUITLESS || refused {
            return Err(RequestError::WorkerLost {
                attempts: self.fruitless,
            });
        }
        tracing::info!(
            sequence = self.sequence,
            attempt = self.attempt + 1,
            output = self.output.len(),
            "sequence goes on elsewhere"
        );
        self.try_again();
        Ok(())
    }

    /// The cluster has changed: what has not begun goes where it now is predicted to end first.
    fn reconsider(&mut self) {
        // The other routings choose without a look at where it is.
        if self.moves == MAX_MOVES || self.dispatch.cluster.routing != Routing::Cost {
            return;
        }
        let (Some(place), Some(stay)) = (self.place(), &self.at) else {
            return;
        };
        if !Arc::ptr_eq(&place.connected, &stay.connected) {
            tracing::info!(
                sequence = self.sequence,
                from = %stay.address,
                to = %place.address,
                "waiting sequence moves"
            );
            self.moves += 1;
            self.detach();
            self.try_again();
        }
    }

    /// Has its next attempt made.
    fn try_again(&mut self) {
        self.attempt += 1;
        self.dispatch.metrics.resubmissions.inc();
    }

    fn place(&self) -> Option<Place> {
        let resumed = !self.output.is_empty();
        self.dispatch.cluster.place(&Wanted {
            model: &self.job.model.name,
            prompt: &self.job.prompt,
            resumed: self.output.len(),
            output: (self.work.output - self.output.len() as f64).max(1.0),
            namespace: &self.job.namespace,
            session_id: &self.job.session_id,
            numerics_id: if resumed { &self.numerics_id } else { &[] },
            avoid: &self.avoid,
            at: self
                .at
                .as_ref()
                .map(|stay| (&stay.connected, stay.uncached)),
        })
    }

    /// A sequence that never ran is sent back rather than kept waiting.
    fn must_fit_elsewhere(&self) -> Result<(), RequestError> {
        match self.place() {
            Some(_) if self.dispatch.may_retry() => Ok(()),
            _ => Err(RequestError::Overloaded {
                retry_after: self.dispatch.retry_after(),
            }),
        }
    }

    /// Finds a worker and submits the sequence, waiting for one within the resume window.
    async fn attach(&mut self) -> Result<(), RequestError> {
        let deadline = self.job.arrival.deadline;
        let since = *self.homeless.get_or_insert_with(Instant::now);
        let give_up = deadline.min(since + self.dispatch.resume_window);
        loop {
            self.changes.mark_unchanged();
            if let Some(place) = self.place() {
                let submit = self.submission(&place);
                let permit = self.permit.take();
                let session = &place.connected.session;
                let submitted = session.submit(submit, place.uncached, permit);
                match timeout_at(deadline, submitted).await {
                    Ok(Ok(attachment)) => {
                        self.settle(place, attachment);
                        return Ok(());
                    }
                    Ok(Err(Closed(permit))) => self.permit = permit,
                    Err(_) => return Err(RequestError::Deadline),
                }
            }
            self.avoid.clear();
            let change = async {
                tokio::select! {
                    _ = self.changes.changed() => {}
                    () = sleep(RETRY_PAUSE) => {}
                }
            };
            if timeout_at(give_up, change).await.is_err() {
                return Err(if give_up == deadline {
                    RequestError::Deadline
                } else {
                    RequestError::NoWorker
                });
            }
        }
    }

    fn settle(&mut self, place: Place, attachment: Attachment) {
        let model = &place.connected.model;
        self.numerics_id.clone_from(&model.description.numerics_id);
        let metrics = &self.dispatch.metrics;
        metrics.placed_tokens.inc_by(place.cached + place.uncached);
        metrics.placed_cached_tokens.inc_by(place.cached);
        self.at = Some(Stay {
            attachment,
            address: place.address,
            connected: place.connected,
            pass: place.pass,
            proven: false,
            uncached: place.uncached,
            _coming: place.coming,
        });
    }

    fn submission(&self, place: &Place) -> Submit {
        let (job, description) = (&self.job, &place.connected.model.description);
        let left = job
            .arrival
            .deadline
            .saturating_duration_since(Instant::now());
        let mut scoring = job.scoring;
        if self.prompt_scored {
            scoring.prompt_top = None;
        }
        Submit {
            sequence: self.sequence,
            attempt: self.attempt,
            epoch: description.epoch,
            prompt: job.prompt.clone(),
            resume: self.output.clone(),
            sampling: Some(job.sampling.clone()),
            stopping: Some(job.stopping.clone()),
            scoring: Some(scoring),
            seed: job.seed,
            choice: self.choice,
            cache_namespace: job.namespace.as_bytes().to_vec(),
            priority: job.priority,
            deadline_in_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1),
            numerics_id: description.numerics_id.clone(),
            traceparent: telemetry::traceparent(&self.span).unwrap_or_default(),
            request_id: job.arrival.request_id.to_string(),
            draft_rows: match job.speculation {
                Speculation::Auto => None,
                Speculation::Off => Some(0),
                Speculation::Fixed(rows) => Some(rows),
            },
            draft_user: scope(job.scopes.user),
            draft_tenant: scope(Some(job.scopes.tenant)),
            draft_public: scope(Some(job.scopes.tenant.public())),
            lead: None,
        }
    }
}

/// A draft scope as it goes over the wire.
fn scope(scope: Option<DraftScope>) -> Vec<u8> {
    scope.map_or_else(Vec::new, |scope| scope.as_bytes().to_vec())
}
