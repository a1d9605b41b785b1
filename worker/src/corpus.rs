//! Text that drafts, as routers send it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::Stream;
use shoal_core::{DraftScope, Subject};
use shoal_draft::{Erased, Erasures, Stamp, Store, Whose};
use shoal_proto::worker::{CorpusPosition, CorpusRecord};
use tonic::{Status, Streaming};

use crate::{config::WorkerConfig, worker::Worker};

/// What a router must find in the description of a worker before it sends texts: that it never
/// forgets an erasure while a text from before it may come.
pub(crate) const ERASURES: &str = "erasures";

/// Logs whose positions are kept.
const MOST_ORIGINS: usize = 256;

/// All text that drafts.
#[derive(Debug)]
pub(crate) struct Corpora {
    pub(crate) store: Store,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// By log: the first offset that is not known.
    next: BTreeMap<u64, u64>,
    erasures: Erasures,
}

impl Corpora {
    pub(crate) fn new(config: &WorkerConfig) -> Self {
        Self {
            store: Store::new(config.corpus_bytes, config.corpus_ttl),
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far it knows a log, and all others.
    fn position(&self, origin: u64) -> CorpusPosition {
        let all = self.known().next.clone();
        CorpusPosition {
            next: all.get(&origin).copied().unwrap_or(0),
            all: all.into_iter().collect(),
        }
    }

    /// Takes a record in, unless it is known.
    fn add(&self, record: &CorpusRecord) -> Result<(), Status> {
        let stamp = Stamp {
            origin: record.origin,
            offset: record.offset,
        };
        let whose = whose(record)?;
        let is_erasure = record.erase && record.scope.is_empty();
        let scope = (!is_erasure).then(|| scope(&record.scope)).transpose()?;
        // Held to the end: what is erased here is not added there meanwhile.
        let mut known = self.known();
        if !known.is_next(stamp) {
            return Ok(());
        }
        let Some(scope) = scope else {
            let whose = whose.ok_or_else(|| Status::invalid_argument("an erasure of nobody"))?;
            let now = Instant::now();
            known.erasures.expire(now, self.store.ttl());
            let erased = Erased {
                stamp,
                id: Stamp {
                    origin: record.erasure_origin,
                    offset: record.erasure_offset,
                },
                whose,
                made: now
                    .checked_sub(Duration::from_millis(record.age_ms))
                    .unwrap_or(now),
            };
            if known.erasures.hear(&erased) {
                self.store.erase(&whose);
            }
            return Ok(());
        };
        if record.erase {
            self.store.clear(&scope);
        } else if whose.is_none_or(|whose| !known.erasures.cover(stamp, &whose)) {
            self.store
                .add(scope, whose, &record.tokens, self.age(record));
        }
        Ok(())
    }

    /// As it counts here: a text is let go when its router lets it go, not later.
    fn age(&self, record: &CorpusRecord) -> Duration {
        let age = Duration::from_millis(record.age_ms);
        let longer = match record.ttl_ms {
            0 => Duration::ZERO,
            ttl => self.store.ttl().saturating_sub(Duration::from_millis(ttl)),
        };
        age + longer
    }
}

impl Known {
    /// Whether the record is yet to be taken in.
    fn is_next(&mut self, stamp: Stamp) -> bool {
        if self.next.len() >= MOST_ORIGINS && !self.next.contains_key(&stamp.origin) {
            // A router that is forgotten sends its log again.
            self.next.pop_first();
        }
        let next = self.next.entry(stamp.origin).or_default();
        let is_next = stamp.offset >= *next;
        if is_next {
            *next = stamp.offset + 1;
        }
        is_next
    }
}

fn scope(bytes: &[u8]) -> Result<DraftScope, Status> {
    let wrong = || sixteen("a draft scope", bytes.len());
    DraftScope::from_bytes(bytes).ok_or_else(wrong)
}

/// Who may have it forgotten, or is forgotten.
fn whose(record: &CorpusRecord) -> Result<Option<Whose>, Status> {
    let subject = |bytes: &[u8]| {
        let wrong = || sixteen("a subject", bytes.len());
        let given = (!bytes.is_empty()).then(|| Subject::from_bytes(bytes).ok_or_else(wrong));
        given.transpose()
    };
    let (tenant, user) = (subject(&record.tenant)?, subject(&record.user)?);
    Ok(tenant.map(|tenant| Whose { tenant, user }))
}

fn sixteen(what: &str, bytes: usize) -> Status {
    Status::invalid_argument(format!("{what} has {bytes} bytes, not 16"))
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
        yield worker.corpora.position(first.origin);
        while let Some(record) = next().await.transpose()?.flatten() {
            worker.corpora.add(&record)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::TokenId;
    use shoal_fabric::net::{Limits, ListenConfig, Network};

    use super::*;

    const TEXT: [TokenId; 6] = [1, 2, 3, 4, 5, 6];

    fn corpora() -> Corpora {
        let listen = ListenConfig {
            address: ([127, 0, 0, 1], 0).into(),
            tls: None,
            limits: Limits::default(),
            network: Network::Tcp,
        };
        Corpora::new(&WorkerConfig::new("".into(), listen))
    }

    fn scope() -> DraftScope {
        DraftScope::tenant("m", b"t", "acme", "").user("a")
    }

    fn text(origin: u64, offset: u64) -> CorpusRecord {
        let tenant = Subject::tenant("acme");
        CorpusRecord {
            origin,
            offset,
            scope: scope().as_bytes().to_vec(),
            tokens: TEXT.to_vec(),
            tenant: tenant.as_bytes().to_vec(),
            user: tenant.user("a").as_bytes().to_vec(),
            ..CorpusRecord::default()
        }
    }

    /// The log of `origin` heard of the erasure (1, 5) at an offset.
    fn erasure(origin: u64, offset: u64) -> CorpusRecord {
        CorpusRecord {
            scope: Vec::new(),
            tokens: Vec::new(),
            erase: true,
            erasure_origin: 1,
            erasure_offset: 5,
            ..text(origin, offset)
        }
    }

    fn drafts(corpora: &Corpora) -> bool {
        let corpus = corpora.store.get(&scope());
        corpus.is_some_and(|corpus| corpus.read().unwrap().longest(&TEXT[..4]).is_some())
    }

    #[test]
    fn an_erasure_takes_what_its_routers_wrote_before_they_heard() {
        let corpora = corpora();
        let add = |record: &CorpusRecord| corpora.add(record).unwrap();
        add(&text(1, 4));
        add(&text(2, 7));
        assert!(drafts(&corpora));
        add(&erasure(1, 5));
        assert!(!drafts(&corpora));
        // Late, from a router that had not heard; and from one that never says so.
        add(&text(2, 8));
        add(&text(3, 1000));
        assert!(!drafts(&corpora));
        add(&erasure(2, 9));
        add(&text(2, 10));
        assert!(drafts(&corpora), "answered anew");
        // It is forgotten once, however many say so.
        add(&erasure(3, 2000));
        assert!(drafts(&corpora));
    }

    #[test]
    fn what_is_known_is_not_taken_twice() {
        let corpora = corpora();
        corpora.add(&text(1, 3)).unwrap();
        corpora.add(&text(1, 3)).unwrap();
        let held = corpora.store.get(&scope()).unwrap();
        assert_eq!(held.read().unwrap().len(), TEXT.len() + 1);
        let position = corpora.position(2);
        assert_eq!((position.next, position.all), (0, [(1, 4)].into()));
    }

    #[test]
    fn a_text_lives_as_long_as_its_router_says() {
        let corpora = corpora();
        let mut old = text(1, 0);
        (old.age_ms, old.ttl_ms) = (1000, 1000);
        corpora.add(&old).unwrap();
        assert!(!drafts(&corpora));
        (old.offset, old.age_ms) = (1, 0);
        corpora.add(&old).unwrap();
        assert!(drafts(&corpora));
    }

    #[test]
    fn wrong_records_are_refused() {
        let corpora = corpora();
        for spoil in [
            |r: &mut CorpusRecord| r.scope.truncate(3),
            |r: &mut CorpusRecord| r.tenant.truncate(3),
            |r: &mut CorpusRecord| r.user.truncate(3),
            |r: &mut CorpusRecord| (r.erase, r.scope, r.tenant) = (true, Vec::new(), Vec::new()),
        ] {
            let mut record = text(1, 0);
            spoil(&mut record);
            assert!(corpora.add(&record).is_err());
        }
    }
}
