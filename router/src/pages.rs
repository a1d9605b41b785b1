//! What the prefix cache of a worker holds: an exact index, kept by the worker's own word.
//!
//! A page counts for a prompt only where every page before it does, since a hash covers the
//! pages before it: one whose parent is unknown is worth nothing. What was lost on the way
//! shows as a gap, after which the worker is asked for a snapshot.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shoal_core::PageHash;
use shoal_proto::worker::{PageBatch, page_event::Event};

/// Most pages of one worker that are kept; those beyond it count as not cached.
const MOST_PAGES: usize = 1 << 20;

/// Why a batch does not follow what is known.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Gap {
    /// A snapshot heals it.
    #[error("changes of the prefix cache were lost")]
    Lost,
    /// No snapshot does: they would all be of that start.
    #[error("the prefix cache is that of another start of the worker")]
    Foreign,
}

/// The index of one session's worker. Its end is the end of the session.
#[derive(Debug)]
pub(crate) struct PageIndex {
    epoch: u64,
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    cached: HashSet<PageHash>,
    /// Changes so far; `None` until a snapshot is whole.
    next: Option<u64>,
    /// The part of a snapshot that has come.
    snapshot: Option<HashSet<PageHash>>,
    /// Pages of prompts that were just sent there, and by how many of them.
    coming: HashMap<PageHash, u32>,
}

impl PageIndex {
    /// The empty index of a worker with that epoch and a pool of `pages`.
    pub(crate) fn new(epoch: u64, pages: u32) -> Self {
        Self {
            epoch,
            limit: (pages as usize).min(MOST_PAGES),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a batch in. After a gap everything up to the next snapshot is passed over.
    pub(crate) fn apply(&self, batch: &PageBatch) -> Result<(), Gap> {
        let mut state = self.lock();
        let state = &mut *state;
        if batch.epoch != self.epoch {
            state.next = None;
            return Err(Gap::Foreign);
        }
        if batch.snapshot_begin {
            state.snapshot = Some(HashSet::new());
        }
        let mut changes = 0;
        let pages = match (&mut state.snapshot, &mut state.next) {
            (Some(snapshot), _) => snapshot,
            (None, Some(next)) if *next == batch.seq => &mut state.cached,
            (None, next) => return next.take().map_or(Ok(()), |_| Err(Gap::Lost)),
        };
        for event in batch.events.iter().filter_map(|event| event.event.as_ref()) {
            let (Event::Stored(bytes) | Event::Removed(bytes)) = event;
            let (hashes, _) = bytes.as_chunks();
            changes += hashes.len() as u64;
            for hash in hashes.iter().map(|hash| PageHash::from_bytes(*hash)) {
                match event {
                    Event::Stored(_) if pages.len() < self.limit => pages.insert(hash),
                    Event::Stored(_) => false,
                    Event::Removed(_) => pages.remove(&hash),
                };
            }
        }
        match &mut state.next {
            Some(next) if state.snapshot.is_none() => *next += changes,
            next if batch.snapshot_end => {
                *next = Some(batch.seq);
                state.cached = state.snapshot.take().unwrap_or_default();
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the index says what the worker holds.
    pub(crate) fn is_exact(&self) -> bool {
        self.lock().next.is_some()
    }

    /// Leading pages of a prompt that are there, or come with a prompt that was sent before.
    /// `own`: it is under way itself, and what it alone brings is still to be computed.
    pub(crate) fn overlap(&self, prompt: &[PageHash], own: bool) -> usize {
        let state = self.lock();
        let comes = |hash| {
            let prompts = state.coming.get(hash);
            prompts.is_some_and(|&prompts| prompts > u32::from(own))
        };
        let is_there = |hash| state.cached.contains(hash) || comes(hash);
        prompt.iter().take_while(|hash| is_there(*hash)).count()
    }

    /// Pages that the worker holds.
    pub(crate) fn len(&self) -> usize {
        self.lock().cached.len()
    }

    /// Counts a prompt's pages as there while it is under way, so that those that share them
    /// follow it before the worker says that they are.
    pub(crate) fn expect(self: &Arc<Self>, prompt: Vec<PageHash>) -> Coming {
        let mut state = self.lock();
        for &hash in &prompt {
            *state.coming.entry(hash).or_default() += 1;
        }
        drop(state);
        Coming {
            index: self.clone(),
            prompt,
        }
    }
}

/// A prompt that is under way to a worker or in its hands.
#[derive(Debug)]
pub(crate) struct Coming {
    index: Arc<PageIndex>,
    prompt: Vec<PageHash>,
}

impl Drop for Coming {
    fn drop(&mut self) {
        let mut state = self.index.lock();
        for hash in &self.prompt {
            if let Some(count) = state.coming.get_mut(hash) {
                *count -= 1;
                if *count == 0 {
                    state.coming.remove(hash);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shoal_proto::worker::PageEvent;

    use super::*;

    const EPOCH: u64 = 3;

    fn hash(n: u8) -> PageHash {
        PageHash::from_bytes([n; 16])
    }

    fn events(events: &[(bool, &[u8])]) -> Vec<PageEvent> {
        let event = |&(stored, pages): &(bool, &[u8])| {
            let hashes = pages.iter().flat_map(|&n| hash(n).to_bytes()).collect();
            PageEvent {
                event: Some(match stored {
                    true => Event::Stored(hashes),
                    false => Event::Removed(hashes),
                }),
            }
        };
        events.iter().map(event).collect()
    }

    fn live(seq: u64, changes: &[(bool, &[u8])]) -> PageBatch {
        PageBatch {
            epoch: EPOCH,
            seq,
            events: events(changes),
            ..PageBatch::default()
        }
    }

    fn snapshot(seq: u64, pages: &[u8]) -> PageBatch {
        PageBatch {
            snapshot_begin: true,
            snapshot_end: true,
            ..live(seq, &[(true, pages)])
        }
    }

    fn index() -> Arc<PageIndex> {
        Arc::new(PageIndex::new(EPOCH, 100))
    }

    fn overlap(index: &PageIndex, prompt: &[u8]) -> usize {
        let prompt: Vec<_> = prompt.iter().map(|&n| hash(n)).collect();
        index.overlap(&prompt, false)
    }

    #[test]
    fn a_page_without_its_parent_counts_for_nothing() {
        let index = index();
        index.apply(&snapshot(0, &[2, 3])).unwrap();
        assert_eq!(overlap(&index, &[1, 2, 3]), 0);
        index.apply(&live(0, &[(true, &[1])])).unwrap();
        assert_eq!(overlap(&index, &[1, 2, 3]), 3);
        index.apply(&live(1, &[(false, &[2])])).unwrap();
        assert_eq!(overlap(&index, &[1, 2, 3]), 1);
    }

    #[test]
    fn a_gap_asks_once_and_the_snapshot_heals_it() {
        let index = index();
        assert_eq!(
            index.apply(&live(5, &[(true, &[9])])),
            Ok(()),
            "no snapshot yet"
        );
        assert!(!index.is_exact());
        index.apply(&snapshot(5, &[1])).unwrap();
        assert_eq!(index.apply(&live(7, &[(true, &[2])])), Err(Gap::Lost));
        assert_eq!(index.apply(&live(8, &[(true, &[3])])), Ok(()));
        assert!(!index.is_exact());
        assert_eq!(
            overlap(&index, &[1, 2]),
            1,
            "the last known stands meanwhile"
        );
        index.apply(&snapshot(9, &[4])).unwrap();
        assert!(index.is_exact());
        assert_eq!(overlap(&index, &[1]), 0);
        assert_eq!(index.len(), 1);
    }

    #[test]
    fn another_epoch_is_foreign() {
        let index = index();
        index.apply(&snapshot(0, &[1])).unwrap();
        let mut foreign = live(0, &[(true, &[2])]);
        foreign.epoch += 1;
        assert_eq!(index.apply(&foreign), Err(Gap::Foreign));
        assert!(!index.is_exact());
    }

    #[test]
    fn a_snapshot_counts_when_it_is_whole() {
        let index = index();
        index.apply(&snapshot(0, &[1])).unwrap();
        let mut begin = snapshot(4, &[2]);
        begin.snapshot_end = false;
        let mut end = snapshot(4, &[3]);
        end.snapshot_begin = false;
        index.apply(&begin).unwrap();
        assert_eq!(overlap(&index, &[1]), 1);
        index.apply(&end).unwrap();
        assert_eq!((overlap(&index, &[1]), overlap(&index, &[2, 3])), (0, 2));
        index.apply(&live(4, &[(true, &[5])])).unwrap();
    }

    #[test]
    fn memory_is_bounded_by_the_pool() {
        let index = PageIndex::new(EPOCH, 2);
        index.apply(&snapshot(0, &[1, 2, 3, 4])).unwrap();
        assert_eq!(index.len(), 2);
    }

    #[test]
    fn prompts_under_way_count_until_they_end() {
        let index = index();
        let (first, second) = (
            index.expect(vec![hash(1), hash(2)]),
            index.expect(vec![hash(1)]),
        );
        assert_eq!(overlap(&index, &[1, 2, 3]), 2);
        let own = index.overlap(&[hash(1), hash(2)], true);
        assert_eq!(own, 1, "only the first comes with another, too");
        drop(first);
        assert_eq!(overlap(&index, &[1, 2, 3]), 1);
        drop(second);
        assert!(index.lock().coming.is_empty());
    }

    proptest! {
        /// Whatever is lost on the way, the index is either exact or says that it is not.
        #[test]
        fn the_index_never_lies(steps in proptest::collection::vec((0u8..8, 0u8..20, any::<bool>()), 1..60)) {
            let index = index();
            let mut truth = HashSet::new();
            let mut seq = 0;
            index.apply(&snapshot(0, &[])).unwrap();
            for (what, page, lost) in steps {
                let stored = what < 4;
                let changed = if stored { truth.insert(hash(page)) } else { truth.remove(&hash(page)) };
                if changed {
                    let asked = !lost && index.apply(&live(seq, &[(stored, &[page])])).is_err();
                    seq += 1;
                    if asked {
                        let pages: Vec<u8> = (0..20).filter(|&n| truth.contains(&hash(n))).collect();
                        index.apply(&snapshot(seq, &pages)).unwrap();
                    }
                    let state = index.lock();
                    if state.next == Some(seq) {
                        prop_assert_eq!(&state.cached, &truth);
                    }
                }
            }
        }
    }
}
