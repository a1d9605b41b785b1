//! The text that drafts: this router's books of it, and the way to the workers.

mod secrets;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use async_stream::stream;
use futures::{Stream, StreamExt};
use shoal_core::TokenId;
use shoal_draft::{Answer, Event, Ledger, LedgerConfig, Listed, Owner, PublicFull, Record};
use shoal_proto::worker::{CorpusRecord, worker_client::WorkerClient};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use crate::{model::Model, request::Job};

/// Tokens that are read from the log at a time.
const BATCH: usize = 16 << 10;
/// Shorter answers teach nothing.
const LEAST_ANSWER: usize = 8;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Corpora {
    ledger: Mutex<Ledger>,
    /// Names the log: another one after a restart.
    origin: u64,
    /// The offset of the next record.
    changes: watch::Sender<u64>,
}

impl Corpora {
    pub(crate) fn new(config: LedgerConfig) -> Self {
        Self {
            ledger: Mutex::new(Ledger::new(config)),
            origin: rand::random(),
            changes: watch::Sender::default(),
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the books and wakes who follows them.
    fn change<T>(&self, change: impl FnOnce(&mut Ledger, Instant) -> T) -> T {
        let mut ledger = self.ledger();
        let result = change(&mut ledger, Instant::now());
        let next = ledger.next();
        drop(ledger);
        self.changes.send_replace(next);
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
            user,
            tokens: output,
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
        self.change(|ledger, now| ledger.load(owner, name, tokens, now))
    }

    /// A tenant's public texts.
    pub(crate) fn list(&self, tenant: &str) -> Vec<Listed> {
        self.ledger().list(tenant)
    }

    /// Drops a public text. False: there is none of that name.
    pub(crate) fn unload(&self, tenant: &str, name: &str) -> bool {
        self.change(|ledger, now| ledger.unload(tenant, name, now))
    }

    /// Forgets the answers to a user, or to all. Takes a while: not for an async thread.
    pub(crate) fn erase(&self, owners: Vec<Owner>, user: Option<&str>) {
        self.change(|ledger, now| ledger.erase(owners, user, now));
    }

    /// Sends a worker the log of its model, from where it knows it, until the session ends.
    pub(crate) async fn feed(
        self: &Arc<Self>,
        mut client: WorkerClient<Channel>,
        model: &Model,
    ) -> Result<(), Status> {
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
        let _ = known.send(position.next);
        positions.message().await?;
        Ok(())
    }

    fn records(
        self: Arc<Self>,
        model: Arc<str>,
        from: oneshot::Receiver<u64>,
    ) -> impl Stream<Item = CorpusRecord> + Send + 'static {
        stream! {
            yield CorpusRecord { origin: self.origin, ..CorpusRecord::default() };
            let Ok(mut at) = from.await else { return };
            self.change(|ledger, now| ledger.retell_public(now));
            let mut changes = self.changes.subscribe();
            loop {
                changes.mark_unchanged();
                let (records, next) = self.ledger().read(at, &model, BATCH);
                for record in records {
                    yield self.to_wire(&record);
                }
                if next == at && changes.changed().await.is_err() {
                    return;
                }
                at = next;
            }
        }
    }

    fn to_wire(&self, record: &Record) -> CorpusRecord {
        let (tokens, erase) = match &record.event {
            Event::Text(tokens) => (tokens.to_vec(), false),
            Event::Erased => (Vec::new(), true),
        };
        CorpusRecord {
            origin: self.origin,
            offset: record.offset,
            scope: record.scope.as_bytes().to_vec(),
            tokens,
            age_ms: record.made.elapsed().as_millis() as u64,
            erase,
        }
    }
}

fn owner(job: &Job) -> Owner {
    Owner {
        model: job.model.name.clone(),
        tenant: job.arrival.caller.tenant.name.clone(),
        scope: job.scopes.tenant,
    }
}
