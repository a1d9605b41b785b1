//! The corpora of a worker, by scope, within one budget.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use shoal_core::{DraftScope, TokenId};

use crate::census::RUN;
use crate::corpus::Corpus;
use crate::record::Whose;

/// A corpus with one writer. Readers never wait for it: they do without.
pub type SharedCorpus = Arc<RwLock<Corpus>>;

/// Tokens that are added under one lock.
const PIECE: usize = 1024;
/// A scope's greatest share of the budget.
const SHARE: usize = 4;
/// Bytes of a full corpus's token.
const TOKEN_BYTES: usize = 12;

/// See the [module](self).
#[derive(Debug)]
pub struct Store {
    budget: usize,
    ttl: Duration,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<DraftScope, Entry>,
    /// Rises with every use.
    clock: u64,
    /// Of all corpora.
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    corpus: SharedCorpus,
    /// Who may have it forgotten.
    whose: Option<Whose>,
    used: u64,
    bytes: usize,
}

impl Store {
    /// An empty store that holds so many bytes at most, and a text for so long.
    pub fn new(budget: usize, ttl: Duration) -> Self {
        Self {
            budget,
            ttl,
            table: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a text is held.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// The corpus of a scope, if there is text of it that is not too old.
    pub fn get(&self, scope: &DraftScope) -> Option<SharedCorpus> {
        let corpus = {
            let mut table = self.lock();
            table.clock += 1;
            let clock = table.clock;
            let entry = table.entries.get_mut(scope)?;
            entry.used = clock;
            entry.corpus.clone()
        };
        // Whoever reads it meanwhile took it when its text was young.
        let oldest = Instant::now().checked_sub(self.ttl);
        if let (Some(oldest), Ok(mut corpus)) = (oldest, corpus.try_write()) {
            corpus.expire(oldest);
        }
        Some(corpus)
    }

    /// Adds a text that was made `age` ago, unless several had it and it is held already: every
    /// router finds such a text. The scopes that were used least recently go where the budget is
    /// spent.
    pub fn add(&self, scope: DraftScope, whose: Option<Whose>, text: &[TokenId], age: Duration) {
        let now = Instant::now();
        let made = now.checked_sub(age).unwrap_or(now);
        if text.is_empty() || age >= self.ttl {
            return;
        }
        let corpus = {
            let mut table = self.lock();
            table.clock += 1;
            let clock = table.clock;
            let entry = table.entries.entry(scope).or_insert_with(|| Entry {
                corpus: Arc::new(RwLock::new(Corpus::new(self.budget / SHARE / TOKEN_BYTES))),
                whose,
                used: 0,
                bytes: 0,
            });
            entry.used = clock;
            entry.corpus.clone()
        };
        if whose.is_some_and(|whose| whose.user.is_none()) {
            let corpus = corpus.read().unwrap_or_else(PoisonError::into_inner);
            if text.windows(RUN).all(|run| corpus.contains(run)) {
                return;
            }
        }
        // A piece at a time, so that a reader that comes meanwhile misses one lookup at most.
        for piece in text.chunks(PIECE) {
            let mut corpus = corpus.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(oldest) = now.checked_sub(self.ttl) {
                corpus.expire(oldest);
            }
            corpus.push(piece, made);
        }
        let bytes = corpus
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes();
        self.account(scope, bytes);
    }

    fn account(&self, scope: DraftScope, bytes: usize) {
        let mut table = self.lock();
        let table = &mut *table;
        if let Some(entry) = table.entries.get_mut(&scope) {
            table.bytes = table.bytes + bytes - std::mem::replace(&mut entry.bytes, bytes);
        }
        while table.bytes > self.budget && table.entries.len() > 1 {
            let oldest = table.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(oldest) = oldest.map(|(scope, _)| *scope) else {
                return;
            };
            table.remove(&oldest);
        }
    }

    /// Forgets the text of a scope, also for those who hold its corpus.
    pub fn clear(&self, scope: &DraftScope) {
        let corpus = self.lock().remove(scope);
        corpus.iter().for_each(empty);
    }

    /// Forgets the texts that an erasure takes, also for those who hold their corpora.
    pub fn erase(&self, whose: &Whose) {
        let taken: Vec<SharedCorpus> = {
            let mut table = self.lock();
            let takes = |entry: &Entry| entry.whose.is_some_and(|text| whose.takes(&text));
            let entries = table.entries.iter().filter(|(_, entry)| takes(entry));
            let scopes: Vec<DraftScope> = entries.map(|(scope, _)| *scope).collect();
            let corpora = scopes.iter().filter_map(|scope| table.remove(scope));
            corpora.collect()
        };
        taken.iter().for_each(empty);
    }
}

fn empty(corpus: &SharedCorpus) {
    let mut corpus = corpus.write().unwrap_or_else(PoisonError::into_inner);
    corpus.clear();
}

impl Table {
    fn remove(&mut self, scope: &DraftScope) -> Option<SharedCorpus> {
        let entry = self.entries.remove(scope)?;
        self.bytes -= entry.bytes;
        Some(entry.corpus)
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::Subject;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn scope(name: &str) -> DraftScope {
        DraftScope::tenant("model", b"tokenizer", name, "")
    }

    fn knows(store: &Store, name: &str, context: &[TokenId]) -> bool {
        let corpus = store.get(&scope(name));
        corpus.is_some_and(|corpus| corpus.read().unwrap().longest(context).is_some())
    }

    #[test]
    fn scopes_are_walls() {
        let store = Store::new(1 << 20, HOUR);
        store.add(scope("a"), None, &[1, 2, 3, 4, 5], Duration::ZERO);
        store.add(scope("b"), None, &[6, 7, 8, 9, 10], Duration::ZERO);
        assert!(knows(&store, "a", &[1, 2, 3, 4]));
        assert!(!knows(&store, "b", &[1, 2, 3, 4]));
        assert!(!knows(&store, "c", &[1, 2, 3, 4]));
    }

    #[test]
    fn what_is_erased_is_gone_for_those_who_hold_it() {
        let store = Store::new(1 << 20, HOUR);
        let (acme, text) = (Subject::tenant("acme"), [1, 2, 3, 4, 5]);
        let whose = |user: Option<&str>| Whose {
            tenant: acme,
            user: user.map(|user| acme.user(user)),
        };
        for (name, whose) in [
            ("a", Some(whose(Some("a")))),
            ("b", Some(whose(Some("b")))),
            ("shared", Some(whose(None))),
            ("public", None),
        ] {
            store.add(scope(name), whose, &text, Duration::ZERO);
        }
        let held = store.get(&scope("a")).unwrap();
        store.erase(&whose(Some("a")));
        assert!(held.read().unwrap().is_empty());
        let known = |name| knows(&store, name, &text[..4]);
        assert_eq!(
            ["a", "b", "shared", "public"].map(known),
            [false, true, false, true]
        );
        store.erase(&whose(None));
        assert_eq!(["b", "public"].map(known), [false, true]);
        store.clear(&scope("public"));
        assert_eq!(store.lock().bytes, 0);
    }

    #[test]
    fn what_several_had_is_held_once() {
        let store = Store::new(1 << 20, HOUR);
        let whose = Whose {
            tenant: Subject::tenant("acme"),
            user: None,
        };
        let text: Vec<TokenId> = (0..20).collect();
        for text in [&text[..], &text[2..19]] {
            store.add(scope("shared"), Some(whose), text, Duration::ZERO);
        }
        let corpus = store.get(&scope("shared")).unwrap();
        assert_eq!(corpus.read().unwrap().len(), text.len() + 1);
    }

    #[test]
    fn a_text_that_grew_old_is_not_found() {
        let store = Store::new(1 << 20, Duration::from_millis(1));
        store.add(scope("a"), None, &[1, 2, 3, 4, 5], Duration::ZERO);
        while knows(&store, "a", &[1, 2, 3, 4]) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_too_old_is_not_taken() {
        let store = Store::new(1 << 20, HOUR);
        store.add(scope("a"), None, &[1, 2, 3, 4, 5], HOUR);
        assert!(store.get(&scope("a")).is_none());
    }

    #[test]
    fn the_scope_that_is_not_used_goes_first() {
        let text: Vec<TokenId> = (0..100).collect();
        let probe = Store::new(1 << 20, HOUR);
        probe.add(scope("a"), None, &text, Duration::ZERO);
        let budget = 9 * probe.lock().bytes / 2;
        let store = Store::new(budget, HOUR);
        for name in ["a", "b", "c", "d"] {
            store.add(scope(name), None, &text, Duration::ZERO);
        }
        assert!(knows(&store, "a", &text[..8]));
        store.add(scope("e"), None, &text, Duration::ZERO);
        for name in ["a", "c", "d", "e"] {
            assert!(knows(&store, name, &text[..8]), "{name}");
        }
        assert!(!knows(&store, "b", &text[..8]));
        assert!(store.lock().bytes <= budget);
    }
}
