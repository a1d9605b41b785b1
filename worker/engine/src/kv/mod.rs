//! KV pages: who holds which, and which finished prompt pages can be shared.
//!
//! A page is *free*, *held* by one or more sequences, or *idle*: held by nobody but kept,
//! because it holds the keys and values of full prompt tokens that may come again. Idle pages
//! are evicted least recently used first.
//!
//! Every holder of a cached page holds its whole chain of parents, and a chain is released
//! from its tail. So a cached page's parent is always cached too, and tails are evicted first.

mod lru;

use std::collections::HashMap;

use shoal_core::{Namespace, PAGE_TOKENS, PageHash, TokenId};

use self::lru::LruList;
use crate::request::PageChange;

/// Full prompt pages of a sequence, by which the cache is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix<'a> {
    pub(crate) namespace: &'a Namespace,
    /// Chained hash of each page.
    pub(crate) hashes: &'a [PageHash],
    /// Tokens of all pages: `hashes.len() * PAGE_TOKENS` of them, or more.
    pub(crate) tokens: &'a [TokenId],
}

impl Prefix<'_> {
    fn page_tokens(&self, page: usize) -> &[TokenId] {
        &self.tokens[page * PAGE_TOKENS..][..PAGE_TOKENS]
    }
}

/// What became of a page offered to the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Insert {
    /// It is cached.
    Cached,
    /// An equal page is cached already. The caller now holds that one instead of its own.
    Replaced(u32),
    /// Other tokens have the same hash; neither the page nor its children can be cached.
    Refused,
}

/// A cached page, with all that makes it what it is: the hash alone proves nothing.
#[derive(Clone, Debug)]
struct Entry {
    hash: PageHash,
    namespace: Namespace,
    parent: Option<u32>,
    tokens: [TokenId; PAGE_TOKENS],
}

impl Entry {
    fn is(&self, namespace: &Namespace, parent: Option<u32>, tokens: &[TokenId]) -> bool {
        self.namespace == *namespace && self.parent == parent && self.tokens == *tokens
    }
}

/// The page pool and its prefix cache.
#[derive(Debug)]
pub(crate) struct KvPages {
    refs: Vec<u32>,
    entries: Vec<Option<Entry>>,
    index: HashMap<PageHash, u32>,
    free: Vec<u32>,
    idle: LruList,
    caching: bool,
    /// Of the cache, since they were taken last.
    changes: Vec<PageChange>,
}

impl KvPages {
    /// A pool of `pages` free pages; `caching` says whether full prompt pages are kept.
    pub(crate) fn new(pages: u32, caching: bool) -> Self {
        let count = pages as usize;
        Self {
            refs: vec![0; count],
            entries: vec![None; count],
            index: HashMap::with_capacity(if caching { count } else { 0 }),
            free: (0..pages).rev().collect(),
            idle: LruList::new(pages),
            caching,
            changes: Vec::new(),
        }
    }

    /// Moves what has changed in the cache to the end of `out`.
    pub(crate) fn take_changes(&mut self, out: &mut Vec<PageChange>) {
        out.append(&mut self.changes);
    }

    /// Pages that can be allocated: free ones and idle ones.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Share of the pages that sequences hold.
    pub(crate) fn usage(&self) -> f64 {
        1.0 - self.available() as f64 / self.refs.len() as f64
    }

    /// The cached pages of the longest known prefix, in order. Each is compared with
    /// namespace, parent and tokens.
    pub(crate) fn matches<'a>(&'a self, prefix: Prefix<'a>) -> impl Iterator<Item = u32> + 'a {
        let mut parent = None;
        prefix
            .hashes
            .iter()
            .enumerate()
            .map_while(move |(i, hash)| {
                let page = *self.index.get(hash)?;
                let entry = self.entries[page as usize].as_ref()?;
                if !entry.is(prefix.namespace, parent, prefix.page_tokens(i)) {
                    return None;
                }
                parent = Some(page);
                Some(page)
            })
    }

    /// Whether nobody holds this page.
    pub(crate) fn is_unheld(&self, page: u32) -> bool {
        self.refs[page as usize] == 0
    }

    /// Holds a cached page once more.
    pub(crate) fn hold(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        if *refs == 0 {
            self.idle.remove(page);
        }
        *refs += 1;
    }

    /// Holds a fresh page, evicting an idle one if none is free.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let page = self.idle.pop_front()?;
                self.forget(page);
                page
            }
        };
        self.refs[page as usize] = 1;
        Some(page)
    }

    /// Offers page `at` of `prefix`, now computed and held by the caller in `held[at]`. The
    /// pages before it must be cached ones.
    pub(crate) fn insert(&mut self, prefix: Prefix<'_>, at: usize, held: &[u32]) -> Insert {
        if !self.caching {
            return Insert::Refused;
        }
        let (page, hash) = (held[at], prefix.hashes[at]);
        let parent = at.checked_sub(1).map(|before| held[before]);
        let tokens = prefix.page_tokens(at);
        if let Some(&known) = self.index.get(&hash) {
            let same = self.entries[known as usize]
                .as_ref()
                .is_some_and(|entry| entry.is(prefix.namespace, parent, tokens));
            if !same {
                return Insert::Refused;
            }
            self.hold(known);
            self.release_one(page);
            return Insert::Replaced(known);
        }
        let mut copy = [0; PAGE_TOKENS];
        copy.copy_from_slice(tokens);
        self.index.insert(hash, page);
        self.changes.push(PageChange::Stored(hash));
        self.entries[page as usize] = Some(Entry {
            hash,
            namespace: *prefix.namespace,
            parent,
            tokens: copy,
        });
        Insert::Cached
    }

    /// Forgets the cached pages that nobody holds.
    pub(crate) fn clear(&mut self) {
        while let Some(page) = self.idle.pop_front() {
            self.forget(page);
            self.free.push(page);
        }
    }

    fn forget(&mut self, page: u32) {
        if let Some(entry) = self.entries[page as usize].take() {
            self.index.remove(&entry.hash);
            self.changes.push(PageChange::Removed(entry.hash));
        }
    }

    /// Lets go of a sequence's pages, last one first.
    pub(crate) fn release(&mut self, pages: &mut Vec<u32>) {
        while let Some(page) = pages.pop() {
            self.release_one(page);
        }
    }

    fn release_one(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs > 0 {
            return;
        }
        if self.entries[page as usize].is_some() {
            self.idle.push_back(page);
        } else {
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
impl KvPages {
    /// Checks that every page is in exactly one state, that the holders are those given, and
    /// that the parent of every cached page is cached.
    pub(crate) fn check<'a>(&self, holders: impl Iterator<Item = &'a [u32]>) {
        let mut refs = vec![0; self.refs.len()];
        for &page in holders.flatten() {
            refs[page as usize] += 1;
        }
        assert_eq!(refs, self.refs, "references");
        let unheld = refs.iter().filter(|&&r| r == 0).count();
        assert_eq!(
            unheld,
            self.available(),
            "every unheld page can be allocated"
        );
        assert!(
            self.free
                .iter()
                .all(|&p| self.entries[p as usize].is_none())
        );
        let cached: Vec<_> = self.entries.iter().flatten().collect();
        assert_eq!(
            cached.len(),
            self.index.len(),
            "one index entry per cached page"
        );
        for (page, entry) in (0..).zip(&self.entries) {
            let Some(entry) = entry else { continue };
            assert_eq!(self.index.get(&entry.hash), Some(&page));
            if let Some(parent) = entry.parent {
                assert!(
                    self.entries[parent as usize].is_some(),
                    "an orphan is cached"
                );
            }
        }
        let mut free = self.free.clone();
        free.sort_unstable();
        free.dedup();
        assert_eq!(free.len(), self.free.len(), "a page is free twice");
    }
}
