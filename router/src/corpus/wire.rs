//! Entries of the logs as they go over the wire.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_core::{DraftScope, Subject};
use shoal_draft::{Entry, Erased, Event, Owner, PublicText, Record, Stamp, Whose};
use shoal_proto::{
    router::{self, LogEntry, TextOwner, log_entry},
    worker::CorpusRecord,
};

/// What another router said makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is missing or has not its length")]
pub(crate) struct WireError(&'static str);

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// When it was, `age_ms` ago.
fn before(now: Instant, age_ms: u64) -> Instant {
    now.checked_sub(Duration::from_millis(age_ms))
        .unwrap_or(now)
}

/// For a worker; workers are told of public texts as of other text.
pub(super) fn to_worker(entry: &Entry, ttl: Duration) -> Option<CorpusRecord> {
    let Stamp { origin, offset } = entry.stamp();
    let record = match entry {
        Entry::Text(record) => {
            let (tenant, user) = subjects(record.whose);
            CorpusRecord {
                scope: record.scope.as_bytes().to_vec(),
                tokens: record.tokens().to_vec(),
                age_ms: millis(record.made),
                erase: record.event == Event::Cleared,
                tenant,
                user,
                ttl_ms: ttl.as_millis() as u64,
                ..CorpusRecord::default()
            }
        }
        Entry::Erased(erased) => {
            let (tenant, user) = subjects(Some(erased.whose));
            CorpusRecord {
                age_ms: millis(erased.made),
                erase: true,
                tenant,
                user,
                erasure_origin: erased.id.origin,
                erasure_offset: erased.id.offset,
                ..CorpusRecord::default()
            }
        }
        Entry::Public(_) => return None,
    };
    Some(CorpusRecord {
        origin,
        offset,
        ..record
    })
}

/// For another router.
pub(super) fn to_router(entry: &Entry) -> LogEntry {
    let Stamp { origin, offset } = entry.stamp();
    let entry = match entry {
        Entry::Text(record) => log_entry::Entry::Answer(answer(record)),
        Entry::Erased(erased) => {
            let (subject_tenant, subject_user) = subjects(Some(erased.whose));
            log_entry::Entry::Erasure(router::Erasure {
                id_origin: erased.id.origin,
                id_offset: erased.id.offset,
                subject_tenant,
                subject_user,
                age_ms: millis(erased.made),
            })
        }
        Entry::Public(text) => log_entry::Entry::Public(router::PublicText {
            owner: Some(owner(&text.owner)),
            name: text.name.clone(),
            version: text.version,
            tokens: text
                .tokens
                .as_deref()
                .map(<[u32]>::to_vec)
                .unwrap_or_default(),
            dropped: text.tokens.is_none(),
        }),
    };
    LogEntry {
        origin,
        offset,
        entry: Some(entry),
    }
}

fn answer(record: &Record) -> router::AnswerText {
    let secrets = match &record.event {
        Event::Answer { secrets, .. } => secrets.as_slice(),
        _ => &[],
    };
    let (subject_tenant, subject_user) = subjects(record.whose);
    let bounds = secrets.iter().flat_map(|secret| [secret.start, secret.end]);
    router::AnswerText {
        owner: Some(owner(&record.owner)),
        scope: record.scope.as_bytes().to_vec(),
        subject_tenant,
        subject_user,
        tokens: record.tokens().to_vec(),
        secrets: bounds.map(|bound| bound as u32).collect(),
        age_ms: millis(record.made),
    }
}

/// The tenant and the user; empty where there is none.
fn subjects(whose: Option<Whose>) -> (Vec<u8>, Vec<u8>) {
    let bytes = |subject: Option<Subject>| subject.map(|s| s.as_bytes().to_vec());
    let (tenant, user) = (whose.map(|w| w.tenant), whose.and_then(|w| w.user));
    (
        bytes(tenant).unwrap_or_default(),
        bytes(user).unwrap_or_default(),
    )
}

fn owner(owner: &Owner) -> TextOwner {
    TextOwner {
        model: owner.model.to_string(),
        tenant: owner.tenant.to_string(),
        scope: owner.scope.as_bytes().to_vec(),
    }
}

/// From another router, as it is at `now`.
pub(super) fn from_router(entry: LogEntry, now: Instant) -> Result<Entry, WireError> {
    let stamp = Stamp {
        origin: entry.origin,
        offset: entry.offset,
    };
    Ok(match entry.entry.ok_or(WireError("an entry"))? {
        log_entry::Entry::Answer(text) => {
            let whose = whose(&text.subject_tenant, &text.subject_user)?;
            whose.user.ok_or(WireError("the user of an answer"))?;
            let length = text.tokens.len();
            let secrets = text.secrets.chunks_exact(2);
            let secrets = secrets.map(|s| s[0] as usize..(s[1] as usize).min(length));
            Entry::Text(Arc::new(Record {
                stamp,
                owner: to_owner(text.owner)?,
                scope: scope(&text.scope)?,
                whose: Some(whose),
                made: before(now, text.age_ms),
                event: Event::Answer {
                    secrets: secrets.collect(),
                    tokens: text.tokens.into(),
                },
            }))
        }
        log_entry::Entry::Erasure(erasure) => Entry::Erased(Erased {
            stamp,
            id: Stamp {
                origin: erasure.id_origin,
                offset: erasure.id_offset,
            },
            whose: whose(&erasure.subject_tenant, &erasure.subject_user)?,
            made: before(now, erasure.age_ms),
        }),
        log_entry::Entry::Public(text) => Entry::Public(PublicText {
            stamp,
            owner: to_owner(text.owner)?,
            name: text.name,
            version: text.version,
            tokens: (!text.dropped).then(|| text.tokens.into()),
        }),
    })
}

fn to_owner(owner: Option<TextOwner>) -> Result<Owner, WireError> {
    let owner = owner.ok_or(WireError("an owner"))?;
    Ok(Owner {
        model: owner.model.into(),
        tenant: owner.tenant.into(),
        scope: scope(&owner.scope)?,
    })
}

fn scope(bytes: &[u8]) -> Result<DraftScope, WireError> {
    DraftScope::from_bytes(bytes).ok_or(WireError("a scope"))
}

fn whose(tenant: &[u8], user: &[u8]) -> Result<Whose, WireError> {
    let subject = |bytes| Subject::from_bytes(bytes).ok_or(WireError("a subject"));
    Ok(Whose {
        tenant: subject(tenant)?,
        user: (!user.is_empty()).then(|| subject(user)).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    fn entries() -> [Entry; 4] {
        let scope = DraftScope::tenant("m", b"t", "acme", "");
        let tenant = Subject::tenant("acme");
        let whose = |user: Option<&str>| Whose {
            tenant,
            user: user.map(|user| tenant.user(user)),
        };
        let owner = Owner {
            model: "m".into(),
            tenant: "acme".into(),
            scope,
        };
        let stamp = Stamp {
            origin: u64::MAX,
            offset: 7,
        };
        let made = Instant::now();
        let public = PublicText {
            stamp,
            owner: owner.clone(),
            name: "faq".into(),
            version: 3,
            tokens: Some([1, 2, 3].into()),
        };
        let dropped = PublicText {
            tokens: None,
            ..public.clone()
        };
        let answer = Record {
            stamp,
            owner,
            scope: scope.user("a"),
            whose: Some(whose(Some("a"))),
            made,
            event: Event::Answer {
                tokens: [1, 2, 3, 4].into(),
                secrets: vec![0..1, 2..4],
            },
        };
        let erased = Erased {
            stamp,
            id: Stamp {
                origin: 1,
                offset: 2,
            },
            whose: whose(None),
            made,
        };
        [
            Entry::Text(Arc::new(answer)),
            Entry::Erased(erased),
            Entry::Public(public),
            Entry::Public(dropped),
        ]
    }

    /// All but the time, which has an age on the wire.
    fn timeless(mut entry: Entry, made: Instant) -> Entry {
        match &mut entry {
            Entry::Text(record) => Arc::make_mut(record).made = made,
            Entry::Erased(erased) => erased.made = made,
            Entry::Public(_) => {}
        }
        entry
    }

    #[test]
    fn entries_come_as_they_went() {
        let now = Instant::now();
        for entry in entries() {
            let come = from_router(to_router(&entry), now).unwrap();
            assert_eq!(timeless(come, now), timeless(entry, now));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let now = Instant::now();
        let mut empty = to_router(&entries()[0]);
        empty.entry = None;
        assert_eq!(from_router(empty, now), Err(WireError("an entry")));
        for spoil in [
            |a: &mut router::AnswerText| a.owner = None,
            |a: &mut router::AnswerText| a.scope.truncate(1),
            |a: &mut router::AnswerText| a.subject_user.clear(),
            |a: &mut router::AnswerText| a.subject_tenant.truncate(1),
        ] {
            let mut entry = to_router(&entries()[0]);
            if let Some(log_entry::Entry::Answer(answer)) = &mut entry.entry {
                spoil(answer);
            }
            assert!(from_router(entry, now).is_err());
        }
    }

    #[test]
    fn workers_hear_of_texts_and_erasures() {
        let [answer, erased, public, _] = entries();
        let text = to_worker(&answer, TTL).unwrap();
        assert_eq!(
            (text.tokens.len(), text.erase, text.ttl_ms),
            (4, false, 60_000)
        );
        assert_eq!((text.tenant.len(), text.user.len()), (16, 16));
        let erasure = to_worker(&erased, TTL).unwrap();
        assert!(erasure.erase && erasure.scope.is_empty() && erasure.user.is_empty());
        assert_eq!((erasure.erasure_origin, erasure.erasure_offset), (1, 2));
        assert_eq!(to_worker(&public, TTL), None);
    }
}
