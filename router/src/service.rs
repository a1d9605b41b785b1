//! The one way of a request, whatever the door: credentials, quota, queue, text, placement.

use std::{pin::Pin, sync::Arc, time::Duration};

use shoal_fabric::{membership::Member, shutdown::Shutdown};
use shoal_proto::inference::GenerateRequest;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::{Span, info_span};

use crate::{
    admission::Admission,
    answer::Answer,
    cluster::Cluster,
    dispatch::Dispatch,
    error::RequestError,
    keys::{ApiKeys, Caller, Tenant},
    metrics::Metrics,
    placement::Work,
    request::{Arrival, Job},
};

/// A router's state, behind every door.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) metrics: Metrics,
    pub(crate) max_body_bytes: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) shutdown: Shutdown,
    /// This router as a member of the cluster.
    pub(crate) own: watch::Sender<Member>,
    admission: Arc<Admission>,
    dispatch: Arc<Dispatch>,
    keys: Option<ApiKeys>,
    /// Whoever calls where no keys are needed.
    anyone: Caller,
    default_max_tokens: Option<u32>,
    /// The requests that are not answered to their end.
    open: TaskTracker,
    /// The end of those that take too long to drain.
    cut: CancellationToken,
}

/// A request that the end of the process waits for.
#[derive(Debug)]
pub(crate) struct Open {
    /// When it waits no longer. Kept, as a new one for every wait would cost more than a token.
    pub(crate) cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _counted: TaskTrackerToken,
}

/// What a [`Service`] is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) metrics: Metrics,
    pub(crate) shutdown: Shutdown,
    pub(crate) own: watch::Sender<Member>,
    pub(crate) keys: Option<ApiKeys>,
    pub(crate) max_body_bytes: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) resume_window: Duration,
    pub(crate) default_max_tokens: Option<u32>,
}

impl Service {
    pub(crate) fn new(parts: Parts) -> Self {
        let dispatch = Dispatch::new(
            parts.cluster.clone(),
            parts.admission.clone(),
            parts.metrics.clone(),
            parts.resume_window,
        );
        Self {
            cluster: parts.cluster,
            metrics: parts.metrics,
            max_body_bytes: parts.max_body_bytes,
            request_timeout: parts.request_timeout,
            shutdown: parts.shutdown,
            own: parts.own,
            admission: parts.admission,
            dispatch: Arc::new(dispatch),
            keys: parts.keys,
            anyone: Caller {
                tenant: Arc::new(Tenant::unlimited("default")),
                user: "".into(),
                operator: true,
                router: true,
            },
            default_max_tokens: parts.default_max_tokens,
            open: TaskTracker::new(),
            cut: CancellationToken::new(),
        }
    }

    /// Who calls, by the `Authorization` header.
    pub(crate) fn caller(&self, authorization: Option<&[u8]>) -> Option<Caller> {
        let Some(keys) = &self.keys else {
            return Some(self.anyone.clone());
        };
        let (scheme, key) = std::str::from_utf8(authorization?).ok()?.split_once(' ')?;
        let key = scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())?;
        keys.caller(key)
    }

    /// Whether a request without a limit gets one here.
    pub(crate) fn has_default_max_tokens(&self) -> bool {
        self.default_max_tokens.is_some()
    }

    /// The sequences at workers, and the requests that wait for admission.
    pub(crate) fn open_work(&self) -> (u32, u32) {
        (self.admission.running(), self.admission.waiting())
    }

    /// Whether new requests are answered.
    pub(crate) fn is_ready(&self) -> bool {
        !self.shutdown.is_started() && self.cluster.is_ready()
    }

    /// Waits until every open request is answered, for `drain` at most; then ends the rest.
    pub(crate) async fn end(&self, drain: Duration) {
        self.open.close();
        if timeout(drain, self.open.wait()).await.is_err() {
            tracing::warn!(open = self.open.len(), "answers cut off");
            self.cut.cancel();
        }
    }

    /// Takes a request as far as its first news.
    pub(crate) async fn generate(
        &self,
        request: GenerateRequest,
        arrival: Arrival,
    ) -> Result<Answer, RequestError> {
        // Counted first: the end waits for whoever still finds the shutdown not started.
        let open = Open {
            // A token of its own: every wait for an event takes its lock.
            cut: Box::pin(self.cut.child_token().cancelled_owned()),
            _counted: self.open.token(),
        };
        if self.shutdown.is_started() {
            return Err(RequestError::Draining);
        }
        let begun = self.begin(request, arrival, open);
        let answer = self.cut.run_until_cancelled(begun).await;
        answer.unwrap_or(Err(RequestError::Draining))
    }

    async fn begin(
        &self,
        request: GenerateRequest,
        arrival: Arrival,
        open: Open,
    ) -> Result<Answer, RequestError> {
        let tenant = arrival.caller.tenant.begin()?;
        let ticket = self
            .admission
            .enter(self.cluster.throughput(), arrival.deadline)?;
        let give_up = Instant::now() + self.dispatch.resume_window;
        let model = self
            .cluster
            .await_model(&request.model, give_up.min(arrival.deadline));
        let model = model.await?;
        let job = Job::new(request, arrival, model, self.default_max_tokens);
        let stages = &self.metrics.stages;
        let job = stages.text.run(info_span!("text"), job).await?;
        let job = Arc::new(job);
        Span::current()
            .record("model", &*job.model.name)
            .record("seed", job.seed);
        let work = Work {
            prompt: job.prompt.len() as f64,
            output: self.admission.expected_output(job.stopping.max_tokens),
        };
        let deadline = job.arrival.deadline;
        let admit = ticket.admit(job.choices, work, job.priority, deadline);
        let admission = info_span!("admission", prompt_tokens = job.prompt.len());
        let permits = stages.admission.run(admission, admit).await?;
        Answer::start(&self.dispatch, job, work, permits, tenant, open).await
    }
}
