//! The public texts of a cluster: of each name, the last one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use shoal_core::{Class, DraftScope, TokenId};

use crate::record::{Owner, PublicText};

/// Names of dropped texts that are kept, so that nobody brings the texts back.
const MOST_DROPPED: usize = 4096;

/// A public text, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name, unique for its tenant and model.
    pub name: String,
    /// The model whose tokens it is in.
    pub model: Arc<str>,
    /// Its length.
    pub tokens: usize,
}

/// There is no room for a public text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the public texts of {of} have at most {most} tokens together, of which {held} are taken")]
pub struct PublicFull {
    /// Whose room is full.
    pub(crate) of: &'static str,
    /// Tokens of the others.
    pub(crate) held: usize,
    /// Tokens of all.
    pub(crate) most: usize,
}

impl PublicFull {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Client
    }
}

/// What a text's arrival means to the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// There was none of that name.
    New,
    /// The scope's text so far is void.
    Replaced,
}

pub(crate) type Key = (DraftScope, String);

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    texts: BTreeMap<Key, Shelved>,
}

#[derive(Debug)]
struct Shelved {
    text: PublicText,
    /// When this router told its workers last.
    told: Option<Instant>,
}

impl Shelf {
    /// Puts a text where it belongs, unless a later one is there.
    pub(crate) fn put(&mut self, text: PublicText) -> Option<Change> {
        let key = (text.owner.scope, text.name.clone());
        let known = self.texts.get(&key).map(|shelved| &shelved.text);
        if known.is_some_and(|known| (known.version, known.stamp) >= (text.version, text.stamp)) {
            return None;
        }
        let is_held = known.is_some_and(|known| known.tokens.is_some());
        self.texts.insert(key, Shelved { text, told: None });
        self.forget_dropped();
        Some(if is_held {
            Change::Replaced
        } else {
            Change::New
        })
    }

    fn forget_dropped(&mut self) {
        let dropped = || self.texts.iter().filter(|(_, s)| s.text.tokens.is_none());
        if dropped().count() > MOST_DROPPED {
            let oldest = dropped().min_by_key(|(_, s)| s.text.version);
            if let Some(key) = oldest.map(|(key, _)| key.clone()) {
                self.texts.remove(&key);
            }
        }
    }

    /// The version after the last one of a name.
    pub(crate) fn next_version(&self, key: &Key) -> u64 {
        let known = self.texts.get(key);
        known.map_or(1, |shelved| shelved.text.version + 1)
    }

    /// Whether a text fits: of its tenant's into half of the room, of all into all of it.
    pub(crate) fn check(&self, key: &Key, tokens: usize, room: usize) -> Result<(), PublicFull> {
        let others = || self.held().filter(|(known, _)| *known != key);
        let sum = |texts: &mut dyn Iterator<Item = (&Key, &PublicText)>| -> usize {
            texts.map(|(_, text)| length(text)).sum()
        };
        let tenant = sum(&mut others().filter(|(known, _)| known.0 == key.0));
        for (of, held, most) in [
            ("a tenant", tenant, room / 2),
            ("a cluster", sum(&mut others()), room),
        ] {
            if held + tokens > most {
                return Err(PublicFull { of, held, most });
            }
        }
        Ok(())
    }

    fn held(&self) -> impl Iterator<Item = (&Key, &PublicText)> {
        let texts = self.texts.iter();
        texts
            .filter_map(|(key, shelved)| shelved.text.tokens.as_ref().map(|_| (key, &shelved.text)))
    }

    /// Tokens of all texts.
    pub(crate) fn tokens(&self) -> usize {
        self.held().map(|(_, text)| length(text)).sum()
    }

    /// Owners of a tenant's texts of a name.
    pub(crate) fn owners(&self, tenant: &str, name: &str) -> Vec<Owner> {
        let named = self.held().filter(|(key, _)| key.1 == name);
        let owners = named.map(|(_, text)| &text.owner);
        owners
            .filter(|owner| *owner.tenant == *tenant)
            .cloned()
            .collect()
    }

    /// A tenant's texts.
    pub(crate) fn list(&self, tenant: &str) -> Vec<Listed> {
        let own = self
            .held()
            .filter(|(_, text)| *text.owner.tenant == *tenant);
        own.map(|(_, text)| Listed {
            name: text.name.clone(),
            model: text.owner.model.clone(),
            tokens: length(text),
        })
        .collect()
    }

    /// The texts of a scope.
    pub(crate) fn of(&self, scope: DraftScope) -> Vec<Key> {
        let own = self.held().filter(|(key, _)| key.0 == scope);
        own.map(|(key, _)| key.clone()).collect()
    }

    /// The texts which are due to be told, by where they come from and when they were told.
    pub(crate) fn due(&self, is_due: impl Fn(u64, Option<Instant>) -> bool) -> Vec<Key> {
        let held = self.texts.iter().filter(|(_, s)| s.text.tokens.is_some());
        held.filter(|(_, s)| is_due(s.text.stamp.origin, s.told))
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// A text that workers are told of now.
    pub(crate) fn tell(&mut self, key: &Key, now: Instant) -> Option<(Owner, Arc<[TokenId]>)> {
        let shelved = self.texts.get_mut(key)?;
        shelved.told = Some(now);
        let tokens = shelved.text.tokens.clone()?;
        Some((shelved.text.owner.clone(), tokens))
    }

    /// What stands in a log at these offsets and still counts, in no order.
    pub(crate) fn written(
        &self,
        origin: u64,
        offsets: Range<u64>,
    ) -> impl Iterator<Item = &PublicText> {
        let texts = self.texts.values().map(|shelved| &shelved.text);
        texts
            .filter(move |text| text.stamp.origin == origin && offsets.contains(&text.stamp.offset))
    }
}

fn length(text: &PublicText) -> usize {
    text.tokens.as_ref().map_or(0, |tokens| tokens.len())
}
