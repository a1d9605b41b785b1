//! The text that drafts: this router's books of it, the way to the workers, and the way to the
//! other routers.

mod secrets;
mod wire;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_stream::stream;
use futures::{Stream, StreamExt};
use shoal_core::TokenId;
use shoal_draft::{
    Answer, ErasuresFull, Ledger, LedgerConfig, Listed, Owner, Positions, PublicFull, Stamp, Whose,
};
use shoal_proto::{
    router::LogBatch,
    worker::{CorpusPosition, CorpusRecord, worker_client::WorkerClient},
};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use crate::{metrics::Metrics, model::Model, request::Job};

pub(crate) use wire::WireError;

/// Tokens that are read from the logs at a time.
const BATCH: usize = 16 << 10;
/// Shorter answers teach nothing.
const LEAST_ANSWER: usize = 8;
/// For the other routers to say that they have heard of an erasure.
const HEARING: Duration = Duration::from_secs(5);
/// The feature of a worker that never misses an erasure.
const ERASURES: &str = "erasures";

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Corpora {
    ledger: Mutex<Ledger>,
    /// Names the log: another one after a restart.
    pub(crate) origin: u64,
    ttl: Duration,
    /// The other routers that are followed, by their logs.
    live: Mutex<BTreeMap<u64, Live>>,
    /// The books are others now.
    changes: watch::Sender<()>,
    /// A router is followed no longer: others may know more of its log.
    losses: watch::Sender<()>,
    metrics: Metrics,
    /// Ends the exchange with other routers.
    pub(crate) closing: CancellationToken,
}

#[derive(Debug)]
struct Live {
    address: Arc<str>,
    links: usize,
}

/// Why an erasure is not everywhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EraseError {
    #[error(transparent)]
    Full(#[from] ErasuresFull),
    #[error("erased here, but not every router has said yet that it has heard: ask again")]
    Unheard,
}

impl Corpora {
    pub(crate) fn new(config: LedgerConfig, metrics: Metrics) -> Self {
        let origin = rand::random();
        Self {
            ledger: Mutex::new(Ledger::new(config, origin)),
            origin,
            ttl: config.ttl,
            live: Mutex::default(),
            changes: watch::Sender::default(),
            losses: watch::Sender::default(),
            metrics,
            closing: CancellationToken::new(),
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<u64, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the books and wakes who follows them.
    fn change<T>(&self, change: impl FnOnce(&mut Ledger, Instant) -> T) -> T {
        let result = change(&mut self.ledger(), Instant::now());
        self.changes.send_replace(());
        result
    }

    /// Takes a finished answer in, unless its user is unknown or its tenant shares nothing.
    pub(crate) fn learn(&self, job: &Job, output: &[TokenId]) {
        let Some(user) = job.scopes.user else { return };
        if output.len() < LEAST_ANSWER || !job.arrival.caller.tenant.remembers {
            return;
        }
        let answer = Answer {
            owner: owner(job),
            scope: user,
            whose: job.scopes.whose,
            tokens: output.into(),
            secrets: secrets::find(&job.model.text.tokenizer, output),
        };
        self.change(|ledger, now| ledger.learn(answer, now));
    }

    /// Loads a public text, if there is room for it.
    pub(crate) fn load(
        &self,
        owner: Owner,
        name: String,
        tokens: Vec<TokenId>,
    ) -> Result<(), PublicFull> {
        self.change(|ledger, now| ledger.load(owner, name, tokens.into(), now))
    }

    /// A tenant's public texts.
    pub(crate) fn list(&self, tenant: &str) -> Vec<Listed> {
        self.ledger().list(tenant)
    }

    /// Drops a public text. False: there is none of that name.
    pub(crate) fn unload(&self, tenant: &str, name: &str) -> bool {
        self.change(|ledger, now| ledger.unload(tenant, name, now))
    }

    /// Forgets the answers to a user, or to all of a tenant, here and at every router that is
    /// followed.
    pub(crate) async fn erase(self: Arc<Self>, whose: Whose) -> Result<(), EraseError> {
        let mut changes = self.changes.subscribe();
        let books = self.clone();
        // The answers of all tenants are counted anew under the lock. Where the books are full, that
        // takes about a second, in which threads of the runtime wait for them, too.
        let erase = move || books.change(|ledger, now| ledger.erase(whose, now));
        let erased = tokio::task::spawn_blocking(erase).await;
        let id: Stamp = erased.map_err(|_| EraseError::Unheard)??;
        let heard = async {
            while !self.ledger().is_heard(id) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let heard = timeout(HEARING, heard).await;
        heard.map_err(|_| EraseError::Unheard)
    }

    /// A receiver of changes; the present state counts as seen.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// A receiver of the losses of links to other routers.
    pub(crate) fn watch_losses(&self) -> watch::Receiver<()> {
        self.losses.subscribe()
    }

    /// How far this router knows the logs of others.
    pub(crate) fn positions(&self) -> Positions {
        self.ledger().positions()
    }

    /// What a router that knows so much is to be told, and how far it has been told then.
    pub(crate) fn batch(&self, positions: &mut Positions, all: bool) -> LogBatch {
        let ledger = self.ledger();
        let entries = ledger.exchange(positions, all, BATCH);
        let end = ledger.next();
        drop(ledger);
        LogBatch {
            origin: self.origin,
            entries: entries.iter().map(wire::to_router).collect(),
            positions: positions.iter().map(|(&o, &next)| (o, next)).collect(),
            end,
        }
    }

    /// So many entries were sent to the router with this log.
    pub(crate) fn sent(&self, origin: u64, entries: usize) {
        let address = self.live().get(&origin).map(|live| live.address.clone());
        let address = address.unwrap_or_else(|| "unknown".into());
        self.metrics.peer(address).sent.inc_by(entries as u64);
    }

    /// Takes over what another router has told. May take a while: not for an async thread.
    pub(crate) fn take(&self, batch: LogBatch) -> Result<(), WireError> {
        let now = Instant::now();
        let entries = batch.entries.into_iter();
        let entries = entries.map(|entry| wire::from_router(entry, now));
        let entries = entries.collect::<Result<Vec<_>, _>>()?;
        let positions = batch.positions.into_iter().collect();
        self.change(|ledger, now| {
            ledger.take(entries, now);
            ledger.advance(&positions);
        });
        Ok(())
    }

    /// The router with this log is followed, until the result is dropped.
    pub(crate) fn follow(self: &Arc<Self>, origin: u64, address: Arc<str>) -> Followed {
        let mut live = self.live();
        let entry = live.entry(origin).or_insert(Live { address, links: 0 });
        entry.links += 1;
        self.set_live(live);
        Followed {
            corpora: self.clone(),
            origin,
        }
    }

    fn set_live(&self, live: MutexGuard<'_, BTreeMap<u64, Live>>) {
        self.change(|ledger, now| ledger.set_live(live.keys().copied().collect(), now));
    }

    /// Sends a worker the log of its model, from where it knows it, until the session ends or
    /// another part of the logs falls to this router.
    pub(crate) async fn feed(
        self: &Arc<Self>,
        mut client: WorkerClient<Channel>,
        model: &Model,
    ) -> Result<(), Status> {
        if !model.description.features.iter().any(|f| f == ERASURES) {
            return std::future::pending().await;
        }
        let (known, from) = oneshot::channel();
        // A connection lives as long as a stream over it: this one ends with the session,
        // whatever becomes of its worker.
        let end = CancellationToken::new();
        let _end = end.clone().drop_guard();
        let records = self.clone().records(model.name.clone(), from);
        let records = records.take_until(end.cancelled_owned());
        let mut positions = client.corpus(records).await?.into_inner();
        let Some(position) = positions.message().await? else {
            return Ok(());
        };
        let _ = known.send(position);
        positions.message().await?;
        Ok(())
    }

    fn records(
        self: Arc<Self>,
        model: Arc<str>,
        from: oneshot::Receiver<CorpusPosition>,
    ) -> impl Stream<Item = CorpusRecord> + Send + 'static {
        stream! {
            yield CorpusRecord { origin: self.origin, ..CorpusRecord::default() };
            let Ok(CorpusPosition { next, all }) = from.await else { return };
            let mut positions: Positions = all.into_iter().collect();
            positions.insert(self.origin, next);
            let orphans = self.change(|ledger, now| {
                ledger.retell_public(now);
                ledger.orphans()
            });
            let mut changes = self.changes.subscribe();
            loop {
                changes.mark_unchanged();
                let entries = {
                    let ledger = self.ledger();
                    if ledger.orphans() != orphans {
                        // The worker has to say how far it knows the others.
                        return;
                    }
                    ledger.read(&mut positions, &model, BATCH)
                };
                for entry in &entries {
                    if let Some(record) = wire::to_worker(entry, self.ttl) {
                        yield record;
                    }
                }
                if entries.is_empty() && changes.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// That a router is followed.
#[derive(Debug)]
pub(crate) struct Followed {
    corpora: Arc<Corpora>,
    origin: u64,
}

impl Drop for Followed {
    fn drop(&mut self) {
        let mut live = self.corpora.live();
        if let Some(entry) = live.get_mut(&self.origin) {
            entry.links -= 1;
            if entry.links == 0 {
                live.remove(&self.origin);
            }
        }
        self.corpora.set_live(live);
        self.corpora.losses.send_replace(());
    }
}

fn owner(job: &Job) -> Owner {
    Owner {
        model: job.model.name.clone(),
        tenant: job.arrival.caller.tenant.name.clone(),
        scope: job.scopes.tenant,
    }
}
