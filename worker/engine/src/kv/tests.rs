use std::collections::HashSet;

use proptest::prelude::*;
use shoal_core::{Namespace, PAGE_TOKENS, PageHash, TokenId};

use super::*;

/// Full pages of a prompt, with their hashes.
#[derive(Clone, Debug)]
struct Prompt {
    namespace: Namespace,
    hashes: Vec<PageHash>,
    tokens: Vec<TokenId>,
}

impl Prompt {
    /// One page per word: its tokens are that number.
    fn new(tenant: &str, words: &[u32]) -> Self {
        let namespace = Namespace::new(tenant, "");
        let mut hash = PageHash::root(&namespace, b"n");
        let hashes = words
            .iter()
            .map(|&word| {
                hash = hash.child(&[word; PAGE_TOKENS], 0);
                hash
            })
            .collect();
        let tokens = words.iter().flat_map(|&w| [w; PAGE_TOKENS]).collect();
        Self {
            namespace,
            hashes,
            tokens,
        }
    }

    fn prefix(&self) -> Prefix<'_> {
        Prefix {
            namespace: &self.namespace,
            hashes: &self.hashes,
            tokens: &self.tokens,
        }
    }

    fn hits(&self, kv: &KvPages) -> usize {
        kv.matches(self.prefix()).count()
    }

    /// Takes its pages as a sequence does: cached ones, then fresh ones; all or none.
    fn take(&self, kv: &mut KvPages) -> Option<Vec<u32>> {
        let mut pages: Vec<u32> = kv.matches(self.prefix()).collect();
        for &page in &pages {
            kv.hold(page);
        }
        while pages.len() < self.hashes.len() {
            match kv.allocate() {
                Some(page) => pages.push(page),
                None => {
                    kv.release(&mut pages);
                    return None;
                }
            }
        }
        Some(pages)
    }

    fn insert(&self, kv: &mut KvPages, pages: &mut [u32]) {
        for at in 0..pages.len() {
            match kv.insert(self.prefix(), at, pages) {
                Insert::Cached => {}
                Insert::Replaced(page) => pages[at] = page,
                Insert::Refused => return,
            }
        }
    }

    fn cache(&self, kv: &mut KvPages) -> Vec<u32> {
        let mut pages = self.take(kv).unwrap();
        self.insert(kv, &mut pages);
        pages
    }
}

#[test]
fn prefixes_are_found_in_their_namespace_alone() {
    let mut kv = KvPages::new(8, true);
    let mut pages = Prompt::new("a", &[1, 2, 3]).cache(&mut kv);
    assert_eq!(Prompt::new("a", &[1, 2, 9]).hits(&kv), 2);
    assert_eq!(Prompt::new("a", &[2]).hits(&kv), 0);
    assert_eq!(Prompt::new("b", &[1, 2, 3]).hits(&kv), 0);
    kv.release(&mut pages);
    assert_eq!(Prompt::new("a", &[1, 2, 3]).hits(&kv), 3);
    assert_eq!(kv.available(), 8);
    assert_eq!(kv.usage(), 0.0);
    kv.check([].into_iter());
}

#[test]
fn equal_hashes_prove_nothing() {
    let mut kv = KvPages::new(16, true);
    let genuine = Prompt::new("a", &[1, 2, 3]);
    let _held = genuine.cache(&mut kv);
    let other_tokens = Prompt {
        hashes: genuine.hashes.clone(),
        ..Prompt::new("a", &[1, 7, 3])
    };
    assert_eq!(other_tokens.hits(&kv), 1);
    let other_tenant = Prompt {
        hashes: genuine.hashes.clone(),
        ..Prompt::new("b", &[1, 2, 3])
    };
    assert_eq!(other_tenant.hits(&kv), 0);
    // The second page, but after another first one.
    let mut other_parent = Prompt::new("a", &[8, 2]);
    let _parent = Prompt::new("a", &[8]).cache(&mut kv);
    other_parent.hashes[1] = genuine.hashes[1];
    assert_eq!(other_parent.hits(&kv), 1);

    // What collides is not cached, nor is anything after it.
    let mut pages = other_tokens.take(&mut kv).unwrap();
    let first = kv.insert(other_tokens.prefix(), 0, &pages);
    assert_eq!(first, Insert::Replaced(pages[0]));
    let second = kv.insert(other_tokens.prefix(), 1, &pages);
    assert_eq!(second, Insert::Refused);
    assert_eq!(genuine.hits(&kv), 3);
    kv.release(&mut pages);
}

#[test]
fn an_equal_page_is_replaced_by_the_cached_one() {
    let mut kv = KvPages::new(8, true);
    let prompt = Prompt::new("a", &[1, 2]);
    let mut first = prompt.take(&mut kv).unwrap();
    let mut second = prompt.take(&mut kv).unwrap();
    prompt.insert(&mut kv, &mut first);
    prompt.insert(&mut kv, &mut second);
    assert_eq!(first, second);
    assert_eq!(kv.available(), 6);
    kv.check([first.as_slice(), &second].into_iter());
}

#[test]
fn the_oldest_goes_first_and_tails_before_heads() {
    let mut kv = KvPages::new(6, true);
    let (old, young) = (Prompt::new("a", &[1, 2, 3]), Prompt::new("a", &[4, 5, 6]));
    let mut pages = old.cache(&mut kv);
    kv.release(&mut pages);
    let mut pages = young.cache(&mut kv);
    kv.release(&mut pages);
    kv.allocate().unwrap();
    assert_eq!((old.hits(&kv), young.hits(&kv)), (2, 3));
    // Used again, the old one is the younger.
    let mut used = Prompt::new("a", &[1, 2]).take(&mut kv).unwrap();
    kv.release(&mut used);
    kv.allocate().unwrap();
    kv.allocate().unwrap();
    assert_eq!((old.hits(&kv), young.hits(&kv)), (2, 1));
}

#[test]
fn nothing_is_kept_without_caching() {
    let mut kv = KvPages::new(4, false);
    let prompt = Prompt::new("a", &[1, 2]);
    let mut pages = prompt.cache(&mut kv);
    kv.release(&mut pages);
    assert_eq!(prompt.hits(&kv), 0);
    kv.check([].into_iter());
}

proptest! {
    /// Any order of taking, caching and letting go keeps the books right.
    #[test]
    fn no_page_is_lost_or_doubled(
        actions in proptest::collection::vec((0u8..3, 0usize..8, proptest::collection::vec(0u32..3, 1..5)), 1..120),
    ) {
        let mut kv = KvPages::new(12, true);
        let mut held: Vec<(Prompt, Vec<u32>)> = Vec::new();
        let (mut told, mut changes) = (HashSet::new(), Vec::new());
        for (action, which, words) in actions {
            match action {
                0 => {
                    let prompt = Prompt::new("a", &words);
                    if let Some(pages) = prompt.take(&mut kv) {
                        held.push((prompt, pages));
                    }
                }
                1 if !held.is_empty() => {
                    let at = which % held.len();
                    let (prompt, pages) = &mut held[at];
                    prompt.insert(&mut kv, pages);
                }
                _ if !held.is_empty() => {
                    let (_, mut pages) = held.swap_remove(which % held.len());
                    kv.release(&mut pages);
                }
                _ => {}
            }
            kv.check(held.iter().map(|(_, pages)| pages.as_slice()));
            kv.take_changes(&mut changes);
            for change in changes.drain(..) {
                let is_news = match change {
                    PageChange::Stored(hash) => told.insert(hash),
                    PageChange::Removed(hash) => told.remove(&hash),
                };
                prop_assert!(is_news);
            }
            prop_assert_eq!(&told, &kv.index.keys().copied().collect());
        }
    }
}
