//! One worker, as the membership and its session tell of it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicI32, Ordering},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use shoal_fabric::membership::Member;
use shoal_proto::worker::{Load, WorkerState, worker_client::WorkerClient};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    breaker::Breaker,
    lead::Score,
    metrics::WorkerStatus,
    model::Model,
    pages::PageIndex,
    placement::Candidate,
    session::{Placed, Session},
};

/// What a worker reported, and what this router had there then.
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    load: Load,
    placed: Placed,
    /// `None` until there is one.
    at: Option<Instant>,
}

/// An open session to a worker.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) model: Arc<Model>,
    pub(crate) session: Arc<Session>,
    pub(crate) pages: Arc<PageIndex>,
    state: AtomicI32,
    suspected: AtomicBool,
    report: ArcSwap<Report>,
    /// Of a draft worker.
    pub(crate) score: Score,
    client: WorkerClient<Channel>,
}

impl Connected {
    pub(crate) fn new(
        model: Arc<Model>,
        session: Arc<Session>,
        client: WorkerClient<Channel>,
    ) -> Self {
        let description = &model.description;
        Self {
            pages: Arc::new(PageIndex::new(description.epoch, description.pages)),
            state: AtomicI32::new(description.state),
            suspected: AtomicBool::new(false),
            report: ArcSwap::default(),
            score: Score::default(),
            model,
            session,
            client,
        }
    }

    pub(crate) fn state(&self) -> WorkerState {
        let state = self.state.load(Ordering::Acquire);
        WorkerState::try_from(state).unwrap_or_default()
    }

    /// Whether it is a draft worker: it runs ahead of sequences and takes none of its own.
    pub(crate) fn drafts(&self) -> bool {
        self.model.description.drafts
    }

    /// Whether it takes sequences.
    pub(crate) fn is_ready(&self) -> bool {
        self.state() == WorkerState::Ready && !self.is_suspected()
    }

    /// Whether it has given no sign of life for too long.
    pub(crate) fn is_suspected(&self) -> bool {
        self.suspected.load(Ordering::Acquire)
    }

    /// True: that is news.
    pub(crate) fn set_suspected(&self, suspected: bool) -> bool {
        self.suspected.swap(suspected, Ordering::AcqRel) != suspected
    }

    pub(crate) fn set_state(&self, state: WorkerState) {
        self.state.store(state as i32, Ordering::Release);
    }

    pub(crate) fn set_load(&self, load: Load) {
        let placed = self.session.placed();
        let at = Some(Instant::now());
        self.report.store(Arc::new(Report { load, placed, at }));
    }

    /// As the worker said last.
    pub(crate) fn load(&self) -> Load {
        self.report.load().load
    }

    /// The same, if it was said after that time.
    pub(crate) fn load_since(&self, time: Instant) -> Option<Load> {
        let report = self.report.load();
        report.at.filter(|at| *at > time).map(|_| report.load)
    }

    /// As a candidate for a sequence of which `cached` tokens need no prefill here.
    pub(crate) fn candidate(&self, cached: f64) -> Candidate {
        let report = self.report.load();
        Candidate {
            load: report.load,
            reported: report.placed,
            placed: self.session.placed(),
            cached,
            fill: (self.pages.len() as f64 / f64::from(self.model.description.pages.max(1)))
                .min(1.0),
        }
    }

    /// For calls beside the session.
    pub(crate) fn client(&self) -> WorkerClient<Channel> {
        self.client.clone()
    }
}

/// A worker that is a member of the cluster, or was one and still answers.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Its group's name.
    pub(crate) group: Arc<str>,
    pub(crate) address: Arc<str>,
    /// As the membership tells of it.
    member: ArcSwap<Member>,
    connected: ArcSwapOption<Connected>,
    pub(crate) breaker: Arc<Breaker>,
    /// No member any more. It gets nothing new where a member can take it, and what it has
    /// goes on: its link alone says when it is gone.
    retired: AtomicBool,
    /// The membership has news of it: a link that pauses tries at once.
    pub(crate) news: Notify,
    pub(crate) gone: CancellationToken,
}

impl Worker {
    pub(crate) fn new(member: &Member) -> Self {
        Self {
            group: member.name.as_str().into(),
            address: member.address.to_string().into(),
            member: ArcSwap::from_pointee(member.clone()),
            connected: ArcSwapOption::empty(),
            breaker: Arc::default(),
            retired: AtomicBool::new(false),
            news: Notify::new(),
            gone: CancellationToken::new(),
        }
    }

    /// Whether the member is this worker.
    pub(crate) fn is(&self, member: &Member) -> bool {
        *self.group == *member.name && *self.address == *member.address.to_string()
    }

    /// What the membership told of it last.
    pub(crate) fn member(&self) -> Arc<Member> {
        self.member.load_full()
    }

    /// Its open session.
    pub(crate) fn connected(&self) -> Option<Arc<Connected>> {
        self.connected.load_full()
    }

    pub(crate) fn connect(&self, connected: Arc<Connected>) {
        self.connected.store(Some(connected));
    }

    /// The session is over; its sequences are lost. False: there was none.
    pub(crate) fn disconnect(&self) -> bool {
        let connected = self.connected.swap(None);
        if let Some(connected) = &connected {
            connected.session.close();
        }
        connected.is_some()
    }

    /// For the metrics.
    pub(crate) fn status(&self) -> WorkerStatus {
        let connected = self.connected.load();
        let connected = connected.as_ref();
        WorkerStatus {
            worker: self.address.clone(),
            up: connected.is_some(),
            ready: connected.is_some_and(|c| c.is_ready()),
            suspected: connected.is_some_and(|c| c.is_suspected()),
            breaker_open: self.breaker.is_open(),
            sequences: connected.map_or(0, |c| c.session.placed().sequences),
            running: connected.map_or(0, |c| c.load().running),
            cached_pages: connected.map_or(0, |c| c.pages.len()),
        }
    }

    /// Whether it takes requests.
    pub(crate) fn is_ready(&self) -> bool {
        let connected = self.connected.load();
        let connected = connected.as_ref();
        connected.is_some_and(|c| c.is_ready() && !c.drafts())
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// It is no member any more.
    pub(crate) fn retire(&self) {
        if !self.retired.swap(true, Ordering::AcqRel) {
            self.news.notify_one();
        }
    }

    /// It is a member, and this is told of it.
    pub(crate) fn learn(&self, member: &Member) {
        let retired = self.retired.swap(false, Ordering::AcqRel);
        if retired || **self.member.load() != *member {
            self.member.store(Arc::new(member.clone()));
            self.news.notify_one();
        }
    }
}
