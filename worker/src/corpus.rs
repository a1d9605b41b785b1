//! Text that drafts, as routers send it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::Stream;
use shoal_core::DraftScope;
use shoal_draft::Store;
use shoal_proto::worker::{CorpusPosition, CorpusRecord};
use tonic::{Status, Streaming};

use crate::{config::WorkerConfig, worker::Worker};

/// Logs whose positions are kept.
const MOST_ORIGINS: usize = 256;

/// All text that drafts.
#[derive(Debug)]
pub(crate) struct Corpora {
    pub(crate) store: Store,
    /// By log: the first offset that is not known.
    next: Mutex<BTreeMap<u64, u64>>,
}

impl Corpora {
    pub(crate) fn new(config: &WorkerConfig) -> Self {
        Self {
            store: Store::new(config.corpus_bytes, config.corpus_ttl),
            next: Mutex::default(),
        }
    }

    fn next(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first offset of a log that is not known.
    fn position(&self, origin: u64) -> u64 {
        self.next().get(&origin).copied().unwrap_or(0)
    }

    /// Takes a record in, unless it is known.
    fn add(&self, record: &CorpusRecord) -> Result<(), Status> {
        let Some(scope) = DraftScope::from_bytes(&record.scope) else {
            let bytes = record.scope.len();
            let message = format!("a draft scope has {bytes} bytes, not 16");
            return Err(Status::invalid_argument(message));
        };
        {
            let mut positions = self.next();
            if positions.len() >= MOST_ORIGINS && !positions.contains_key(&record.origin) {
                // A router that is forgotten sends its log again.
                positions.pop_first();
            }
            let next = positions.entry(record.origin).or_default();
            if record.offset < *next {
                return Ok(());
            }
            *next = record.offset + 1;
        }
        if record.erase {
            self.store.erase(&scope);
        } else {
            let age = Duration::from_millis(record.age_ms);
            self.store.add(scope, &record.tokens, age);
        }
        Ok(())
    }
}

/// Takes a router's records in until they end.
pub(crate) fn follow(
    worker: Arc<Worker>,
    mut records: Streaming<CorpusRecord>,
) -> impl Stream<Item = Result<CorpusPosition, Status>> + Send + 'static {
    let closing = worker.closing.clone();
    let next = async move || closing.run_until_cancelled(records.message()).await;
    async_stream::try_stream! {
        let mut next = next;
        let Some(first) = next().await.transpose()?.flatten() else { return };
        yield CorpusPosition { next: worker.corpora.position(first.origin) };
        while let Some(record) = next().await.transpose()?.flatten() {
            worker.corpora.add(&record)?;
        }
    }
}
