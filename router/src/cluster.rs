//! The workers that this router knows, and what they serve.

use std::{
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use shoal_fabric::{membership::Membership, net::ClientConfig, shutdown::Shutdown};
use shoal_proto::worker::{Load, WorkerState};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Throughput,
    error::RequestError,
    link,
    metrics::WorkerStatus,
    model::{Model, TextCache, unix_seconds},
    placement::{self, Candidate, Work},
    session::Session,
};

/// How links to workers behave.
#[derive(Clone, Debug)]
pub(crate) struct LinkConfig {
    pub(crate) client: ClientConfig,
    /// Without a frame for so long, the worker is dead.
    pub(crate) silence: Duration,
    /// With work but without a step for so long, it hangs.
    pub(crate) stall: Duration,
}

/// An open session to a worker.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) model: Arc<Model>,
    pub(crate) session: Arc<Session>,
    state: AtomicI32,
    load: ArcSwap<Load>,
}

impl Connected {
    pub(crate) fn new(model: Arc<Model>, session: Arc<Session>) -> Self {
        Self {
            state: AtomicI32::new(model.description.state),
            load: ArcSwap::default(),
            model,
            session,
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state.load(Ordering::Acquire) == WorkerState::Ready as i32
    }

    pub(crate) fn set_state(&self, state: WorkerState) {
        self.state.store(state as i32, Ordering::Release);
    }

    pub(crate) fn set_load(&self, load: Load) {
        self.load.store(Arc::new(load));
    }

    fn load(&self) -> Load {
        **self.load.load()
    }
}

/// A member of the cluster.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) address: Arc<str>,
    connected: ArcSwapOption<Connected>,
    gone: CancellationToken,
}

/// What a placement asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) model: &'a str,
    pub(crate) work: Work,
    /// Keeps a conversation on one worker; empty is none.
    pub(crate) session_id: &'a str,
    /// Preferred numerics: the output so far was made with them. Empty is any.
    pub(crate) numerics_id: &'a [u8],
    /// Workers that just refused, by address.
    pub(crate) avoid: &'a [Arc<str>],
}

/// A worker to submit to.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) address: Arc<str>,
    pub(crate) connected: Arc<Connected>,
}

/// All workers and models.
#[derive(Debug)]
pub(crate) struct Cluster {
    workers: ArcSwap<Vec<Arc<Worker>>>,
    /// The models ever seen, newest last, one per name.
    models: ArcSwap<Vec<Arc<Model>>>,
    pub(crate) texts: TextCache,
    changes: watch::Sender<()>,
}

impl Cluster {
    /// Follows the membership and keeps a link to every member until the shutdown.
    pub(crate) fn start(
        membership: &dyn Membership,
        config: LinkConfig,
        shutdown: &Shutdown,
    ) -> Arc<Self> {
        let cluster = Arc::new(Self {
            workers: ArcSwap::default(),
            models: ArcSwap::default(),
            texts: TextCache::default(),
            changes: watch::Sender::default(),
        });
        let mut members = membership.watch();
        let (follower, tasks) = (cluster.clone(), shutdown.clone());
        let stop = shutdown.token();
        shutdown.spawn(stop.run_until_cancelled_owned(async move {
            loop {
                let endpoints = members.borrow_and_update().clone();
                let old = follower.workers.load_full();
                let mut new = Vec::with_capacity(endpoints.len());
                for endpoint in endpoints.iter() {
                    let address: Arc<str> = endpoint.to_string().into();
                    if let Some(known) = old.iter().find(|w| w.address == address) {
                        new.push(known.clone());
                        continue;
                    }
                    let worker = Arc::new(Worker {
                        address,
                        connected: ArcSwapOption::empty(),
                        gone: CancellationToken::new(),
                    });
                    new.push(worker.clone());
                    let (cluster, gone) = (follower.clone(), worker.gone.clone());
                    let link = link::keep(cluster, worker, endpoint.clone(), config.clone());
                    tasks.spawn(gone.run_until_cancelled_owned(link));
                }
                for worker in old
                    .iter()
                    .filter(|w| !new.iter().any(|n| Arc::ptr_eq(n, w)))
                {
                    worker.gone.cancel();
                }
                follower.workers.store(Arc::new(new));
                follower.changed();
                if members.changed().await.is_err() {
                    // The list is final.
                    std::future::pending::<()>().await;
                }
            }
        }));
        cluster
    }

    /// Ends every link.
    pub(crate) fn stop(&self) {
        for worker in self.workers.load().iter() {
            worker.gone.cancel();
        }
    }

    /// Wakes whoever waits for a change of a worker.
    pub(crate) fn changed(&self) {
        self.changes.send_replace(());
    }

    /// A receiver of changes; the present state counts as seen.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// A session to the worker is open.
    pub(crate) fn connect(&self, worker: &Worker, connected: Arc<Connected>) {
        let model = &connected.model;
        self.models.rcu(|models| {
            let others = models.iter().filter(|m| m.name != model.name);
            others.chain([model]).cloned().collect::<Vec<_>>()
        });
        worker.connected.store(Some(connected));
        self.changed();
    }

    /// The session is over; its sequences are lost.
    pub(crate) fn disconnect(&self, worker: &Worker) {
        if let Some(connected) = worker.connected.swap(None) {
            connected.session.close();
        }
        self.changed();
    }

    fn ready(&self) -> Vec<Place> {
        let workers = self.workers.load();
        let ready = workers.iter().filter_map(|worker| {
            let connected = worker.connected.load_full().filter(|c| c.is_ready())?;
            Some(Place {
                address: worker.address.clone(),
                connected,
            })
        });
        ready.collect()
    }

    /// Whether any worker takes sequences.
    pub(crate) fn is_ready(&self) -> bool {
        let workers = self.workers.load();
        let ready = |w: &Arc<Worker>| w.connected.load().as_ref().is_some_and(|c| c.is_ready());
        workers.iter().any(ready)
    }

    /// The model of that name; the only one there is for an empty name.
    pub(crate) fn model(&self, name: &str) -> Result<Arc<Model>, RequestError> {
        let models = self.models.load();
        match (name, models.as_slice()) {
            (_, []) => Err(RequestError::NoWorker),
            ("", [model]) => Ok(model.clone()),
            ("", _) => Err(RequestError::invalid(
                "model",
                "model is required: several are served",
            )),
            (name, models) => {
                let model = models.iter().find(|m| *m.name == *name);
                model.cloned().ok_or_else(|| RequestError::ModelNotFound {
                    model: name.to_owned(),
                })
            }
        }
    }

    /// Unix seconds at which a model of that name came up first.
    pub(crate) fn first_seen(&self, name: &str) -> u64 {
        let models = self.models.load();
        let known = models.iter().find(|m| *m.name == *name);
        known.map_or_else(unix_seconds, |m| m.created)
    }

    /// The models with a ready worker, by name.
    pub(crate) fn models(&self) -> Vec<Arc<Model>> {
        let mut models: Vec<Arc<Model>> = Vec::new();
        for place in self.ready() {
            let model = &place.connected.model;
            if !models.iter().any(|m| m.name == model.name) {
                models.push(model.clone());
            }
        }
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models
    }

    /// Measured speed of the ready workers.
    pub(crate) fn throughput(&self) -> Throughput {
        let mut sum = Throughput::default();
        for place in self.ready() {
            let load = place.connected.load();
            sum.prefill += placement::prefill_tps(&load);
            sum.decode += placement::decode_tps(&load);
        }
        sum
    }

    /// The cheapest ready worker.
    pub(crate) fn place(&self, wanted: &Wanted<'_>) -> Option<Place> {
        let mut places = self.ready();
        places.retain(|p| *p.connected.model.name == *wanted.model);
        let home = home(&places, wanted.session_id);
        places.retain(|p| !wanted.avoid.contains(&p.address));
        let same = |p: &Place| {
            wanted.numerics_id.is_empty()
                || p.connected.model.description.numerics_id == wanted.numerics_id
        };
        if places.iter().any(same) {
            places.retain(same);
        }
        let candidates: Vec<Candidate> = places
            .iter()
            .map(|place| Candidate {
                load: place.connected.load(),
                placed: place.connected.session.placed(),
                affine: home.as_ref() == Some(&place.address),
            })
            .collect();
        let chosen = placement::cheapest(&candidates, &wanted.work)?;
        Some(places.swap_remove(chosen))
    }

    /// Every worker, for the metrics.
    pub(crate) fn status(&self) -> Vec<WorkerStatus> {
        let workers = self.workers.load();
        let status = |worker: &Arc<Worker>| {
            let connected = worker.connected.load();
            let connected = connected.as_ref();
            WorkerStatus {
                worker: worker.address.clone(),
                up: connected.is_some(),
                ready: connected.is_some_and(|c| c.is_ready()),
                sequences: connected.map_or(0, |c| c.session.placed().sequences),
                running: connected.map_or(0, |c| c.load().running),
            }
        };
        workers.iter().map(status).collect()
    }
}

/// The worker on which a conversation lives: highest random weight (Thaler, Ravishankar
/// 1998), so that a change of the cluster moves as few conversations as possible.
fn home(places: &[Place], session_id: &str) -> Option<Arc<str>> {
    if session_id.is_empty() {
        return None;
    }
    let weight = |place: &&Place| {
        let mut hasher = std::hash::DefaultHasher::new();
        (session_id, &place.address).hash(&mut hasher);
        hasher.finish()
    };
    places.iter().max_by_key(weight).map(|p| p.address.clone())
}
