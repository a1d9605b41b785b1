//! The workers that this router knows, and what they serve.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use shoal_fabric::{
    membership::{Member, Membership, View},
    net::ClientConfig,
    shutdown::Shutdown,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    admission::Throughput,
    corpus::Corpora,
    error::RequestError,
    link,
    metrics::{Metrics, WorkerStatus},
    model::{Model, TextCache, unix_seconds},
    placement::{self, Routing},
    worker::{Connected, Worker},
};

/// How links to workers behave.
#[derive(Clone, Debug)]
pub(crate) struct LinkConfig {
    pub(crate) client: ClientConfig,
    /// Without a frame for so long, the worker is suspected.
    pub(crate) silence: Duration,
    /// The same with work but without a step, unless the step is predicted to be long.
    pub(crate) stall: Duration,
}

/// A worker that takes sequences.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    pub(crate) worker: Arc<Worker>,
    pub(crate) connected: Arc<Connected>,
}

/// All workers and models.
#[derive(Debug)]
pub(crate) struct Cluster {
    workers: ArcSwap<Vec<Arc<Worker>>>,
    /// Held while the list of workers changes.
    changing: Mutex<()>,
    /// The other routers and this one, as the membership tells of them.
    routers: ArcSwap<Vec<Member>>,
    /// The models ever seen, newest last, one per name.
    models: ArcSwap<Vec<Arc<Model>>>,
    pub(crate) texts: TextCache,
    /// Text that drafts, for the workers.
    pub(crate) corpora: Arc<Corpora>,
    changes: watch::Sender<()>,
    pub(crate) metrics: Metrics,
    pub(crate) routing: Routing,
    /// Placements so far.
    turns: AtomicUsize,
}

impl Cluster {
    /// A cluster without workers.
    pub(crate) fn new(routing: Routing, metrics: Metrics, corpora: Arc<Corpora>) -> Self {
        Self {
            workers: ArcSwap::default(),
            changing: Mutex::default(),
            routers: ArcSwap::default(),
            models: ArcSwap::default(),
            texts: TextCache::default(),
            corpora,
            changes: watch::Sender::default(),
            metrics,
            routing,
            turns: AtomicUsize::new(0),
        }
    }

    /// Follows the membership and keeps a link to every member until the shutdown.
    pub(crate) fn start(
        membership: &dyn Membership,
        config: LinkConfig,
        routing: Routing,
        metrics: Metrics,
        corpora: Arc<Corpora>,
        shutdown: &Shutdown,
    ) -> Arc<Self> {
        let cluster = Arc::new(Self::new(routing, metrics, corpora));
        let mut members = membership.watch();
        let (follower, tasks) = (cluster.clone(), shutdown.clone());
        let stop = shutdown.token();
        shutdown.spawn(stop.run_until_cancelled_owned(async move {
            loop {
                let view = members.borrow_and_update().clone();
                for worker in follower.follow(&view) {
                    let gone = worker.gone.clone();
                    let link = link::keep(follower.clone(), worker, config.clone());
                    tasks.spawn(gone.run_until_cancelled_owned(link));
                }
                follower.changed();
                if members.changed().await.is_err() {
                    // The list is final.
                    std::future::pending::<()>().await;
                }
            }
        }));
        cluster
    }

    /// Takes a view over. Returns the workers that are new: they have no link yet.
    pub(crate) fn follow(&self, view: &View) -> Vec<Arc<Worker>> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut workers = Vec::clone(&self.workers.load());
        for worker in &workers {
            if !view.workers.iter().any(|member| worker.is(member)) {
                worker.retire();
            }
        }
        let mut new = Vec::new();
        for member in &view.workers {
            match workers.iter().find(|worker| worker.is(member)) {
                Some(known) => known.learn(member),
                None => new.push(Arc::new(Worker::new(member))),
            }
        }
        workers.extend(new.iter().cloned());
        self.workers.store(Arc::new(workers));
        self.routers.store(Arc::new(view.routers.clone()));
        new
    }

    /// Lets go of a worker without a connection, unless it is a member.
    pub(crate) fn forget(&self, worker: &Arc<Worker>) -> bool {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if !worker.is_retired() {
            return false;
        }
        let mut workers = Vec::clone(&self.workers.load());
        workers.retain(|known| !Arc::ptr_eq(known, worker));
        self.workers.store(Arc::new(workers));
        true
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
        if !connected.drafts() {
            self.models.rcu(|models| {
                let others = models.iter().filter(|m| m.name != model.name);
                others.chain([model]).cloned().collect::<Vec<_>>()
            });
        }
        worker.connect(connected);
        self.changed();
    }

    /// The session is over; its sequences are lost. False: there was none.
    pub(crate) fn disconnect(&self, worker: &Worker) -> bool {
        let was_up = worker.disconnect();
        if was_up {
            self.changed();
        }
        was_up
    }

    /// Every worker, ready or not.
    pub(crate) fn workers(&self) -> Arc<Vec<Arc<Worker>>> {
        self.workers.load_full()
    }

    /// Every router that the membership tells of.
    pub(crate) fn routers(&self) -> Arc<Vec<Member>> {
        self.routers.load_full()
    }

    /// The workers that take requests.
    pub(crate) fn ready(&self) -> Vec<Ready> {
        let workers = self.workers.load();
        let ready = workers.iter().filter_map(|worker| {
            let connected = worker.connected();
            let connected = connected.filter(|c| c.is_ready() && !c.drafts())?;
            Some(Ready {
                worker: worker.clone(),
                connected,
            })
        });
        ready.collect()
    }

    /// The draft worker of a model's tokenizer that runs ahead of the fewest sequences.
    pub(crate) fn drafter(&self, model: &Model) -> Option<Arc<Connected>> {
        let tokenizer = &model.description.tokenizer_sha256;
        let fits = |c: &Arc<Connected>| {
            let same = c.model.description.tokenizer_sha256 == *tokenizer;
            c.drafts() && c.is_ready() && same
        };
        let workers = self.workers.load();
        let drafters = workers.iter().filter_map(|w| w.connected().filter(fits));
        drafters.min_by_key(|c| c.session.placed().sequences)
    }

    /// Whether any worker takes requests.
    pub(crate) fn is_ready(&self) -> bool {
        let workers = self.workers.load();
        workers.iter().any(|worker| worker.is_ready())
    }

    /// The model of that name. For an empty name the only one that is served, or that was where
    /// none is: one that another took the place of does not count.
    pub(crate) fn model(&self, name: &str) -> Result<Arc<Model>, RequestError> {
        let seen = self.models.load();
        if seen.is_empty() {
            return Err(RequestError::NoWorker);
        }
        let find = |name: &str| {
            let model = seen.iter().find(|m| *m.name == *name);
            let served = model.map(|model| self.served(model));
            served.ok_or_else(|| RequestError::ModelNotFound {
                model: name.to_owned(),
            })
        };
        if !name.is_empty() {
            return find(name);
        }
        match (self.models().as_slice(), seen.as_slice()) {
            ([model], _) | ([], [model]) => find(&model.name),
            ([], _) => Err(RequestError::NoWorker),
            _ => Err(RequestError::invalid(
                "model",
                "model is required: several are served",
            )),
        }
    }

    /// The same; where no worker says which one is meant, it waits for one.
    pub(crate) async fn await_model(
        &self,
        name: &str,
        give_up: Instant,
    ) -> Result<Arc<Model>, RequestError> {
        let mut changes = self.watch();
        loop {
            match self.model(name) {
                Err(RequestError::NoWorker) => {}
                known => return known,
            }
            let change = timeout_at(give_up, changes.changed()).await;
            change
                .map_err(|_| RequestError::NoWorker)?
                .map_err(|_| RequestError::Draining)?;
        }
    }

    /// A model as the most ready workers of its name have its tokens, with the longest context
    /// of them; as the newest has it where none is ready.
    fn served(&self, newest: &Arc<Model>) -> Arc<Model> {
        let ready = self.ready();
        let models = ready.iter().map(|r| &r.connected.model);
        let models: Vec<_> = models.filter(|m| m.name == newest.name).collect();
        let rank = |model: &&Arc<Model>| {
            (
                models.iter().filter(|m| m.shares_tokens(model)).count(),
                model.shares_tokens(newest),
                model.context(),
            )
        };
        let served = models.iter().copied().max_by_key(rank);
        served.unwrap_or(newest).clone()
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
        for ready in self.ready() {
            let model = &ready.connected.model;
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
        for ready in self.ready() {
            let load = ready.connected.load();
            sum.prefill += placement::prefill_tps(&load);
            sum.decode += placement::decode_tps(&load);
        }
        sum
    }

    /// How many workers were chosen before.
    pub(crate) fn turn(&self) -> usize {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether a worker other than this one could go on with what it has.
    pub(crate) fn has_other(&self, connected: &Arc<Connected>) -> bool {
        let ready = self.ready();
        ready.iter().any(|other| {
            !Arc::ptr_eq(&other.connected, connected)
                && other.connected.model.shares_tokens(&connected.model)
                && other.worker.breaker.admits()
        })
    }

    /// Every worker, for the metrics.
    pub(crate) fn status(&self) -> Vec<WorkerStatus> {
        self.workers.load().iter().map(|w| w.status()).collect()
    }
}
