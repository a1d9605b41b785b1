//! The attempts of a generation: where each goes, and what follows when it ends early.

use std::{sync::Arc, time::Duration};

use shoal_core::{DraftScope, Speculation};
use shoal_fabric::telemetry;
use shoal_proto::{
    MAX_ROUTER_FRAME,
    worker::{Logprob, Submit},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::Generation;
use crate::{
    breaker::Pass,
    error::RequestError,
    pages::Coming,
    place::{At, Place, Wanted},
    placement::Routing,
    session::{Attachment, NotSubmitted},
    worker::Connected,
};

/// Attempts without a new token after which a sequence counts as the cause of its losses.
const MAX_FRUITLESS: u32 = 4;
/// Times that a sequence moves while it waits, lest it does nothing else.
const MAX_MOVES: u32 = 4;
/// Between tries where every worker refuses a sequence that was running.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// An attempt at a worker.
#[derive(Debug)]
pub(super) struct Stay {
    pub(super) attachment: Attachment,
    pub(super) address: Arc<str>,
    pub(super) connected: Arc<Connected>,
    pub(super) pass: Pass,
    /// It has had output here.
    pub(super) proven: bool,
    /// Of the prompt, as many as have come: they come in pieces.
    pub(super) prompt_scores: Vec<Logprob>,
    /// Tokens to prefill when it came.
    uncached: u64,
    _coming: Coming,
}

impl Generation {
    pub(super) fn detach(&mut self) {
        if let Some(stay) = self.at.take() {
            self.permit = stay.attachment.take_permit();
        }
    }

    /// The worker failed it, unless it said that it takes nothing more.
    pub(super) fn blame(&mut self) {
        if let Some(stay) = &mut self.at
            && stay.connected.is_ready()
        {
            stay.pass.fail();
        }
    }

    /// The worker is gone, or has given the sequence up.
    pub(super) fn lose(&mut self) -> Result<(), RequestError> {
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
    pub(super) fn reconsider(&mut self) {
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

    /// Has its next attempt made. It had a worker until now.
    fn try_again(&mut self) {
        self.homeless = None;
        self.attempt += 1;
        self.dispatch.metrics.resubmissions.inc();
    }

    fn place(&self) -> Option<Place> {
        let resumed = !self.output.is_empty();
        self.dispatch.cluster.place(&Wanted {
            model: &self.job.model,
            prompt: &self.job.prompt,
            resumed: self.output.len(),
            output: (self.work.output - self.output.len() as f64).max(1.0),
            max_tokens: self.job.stopping.max_tokens as usize,
            namespace: &self.job.namespace,
            session_id: &self.job.session_id,
            numerics_id: if resumed { &self.numerics_id } else { &[] },
            avoid: &self.avoid,
            at: self.at.as_ref().map(|stay| At {
                connected: &stay.connected,
                unstarted: stay.uncached,
                probes: stay.pass.probes(),
            }),
        })
    }

    /// A sequence that never ran is sent back rather than kept waiting.
    pub(super) fn must_fit_elsewhere(&self) -> Result<(), RequestError> {
        match self.place() {
            Some(_) if self.dispatch.may_retry() => Ok(()),
            _ => Err(RequestError::Overloaded {
                retry_after: self.dispatch.retry_after(),
            }),
        }
    }

    /// Finds a worker and submits the sequence, waiting for one within the resume window.
    pub(super) async fn attach(&mut self) -> Result<(), RequestError> {
        let deadline = self.job.arrival.deadline;
        let since = *self.homeless.get_or_insert_with(Instant::now);
        let give_up = deadline.min(since + self.dispatch.resume_window);
        loop {
            self.changes.mark_unchanged();
            if let Some(place) = self.place() {
                let submit = self.submission(&place);
                // The end of an attempt took its permit, lest one whose client does not read
                // kept others out meanwhile.
                let admission = &self.dispatch.admission;
                let permit = self.permit.take();
                let permit = permit.unwrap_or_else(|| admission.readmit(self.work));
                let session = &place.connected.session;
                let submitted = session.submit(submit, place.uncached, Some(permit));
                match timeout_at(deadline, submitted).await {
                    Ok(Ok(attachment)) => {
                        self.settle(place, attachment);
                        return Ok(());
                    }
                    Ok(Err(NotSubmitted::Closed(permit))) => self.permit = permit,
                    Ok(Err(NotSubmitted::TooLarge)) => {
                        return Err(RequestError::SubmissionTooLarge {
                            limit: MAX_ROUTER_FRAME,
                        });
                    }
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
            prompt_scores: Vec::new(),
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
