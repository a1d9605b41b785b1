//! What the prefix cache holds, and who follows it.
//!
//! The engine's thread writes each step's changes into a short log and into the set of what is
//! cached; a follower reads the log from where it was. One that has fallen behind the log gets
//! the set instead: nobody's slowness costs memory.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shoal_core::PageHash;
use shoal_engine::request::PageChange;
use shoal_proto::worker::{PageBatch, PageEvent, page_event::Event};
use tokio::sync::watch;

/// Changes that are kept for followers.
const LOG: usize = 8192;
/// Most pages of a batch, which is then within 64 KiB.
const BATCH: usize = 2048;

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Pages {
    state: Mutex<State>,
    /// Changes so far; the log holds the last of them. It changes with the state, under its lock.
    end: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    cached: HashSet<PageHash>,
    log: VecDeque<PageChange>,
}

impl Pages {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in the changes of a step.
    pub(crate) fn change(&self, changes: &[PageChange]) {
        let mut state = self.lock();
        for &change in changes {
            match change {
                PageChange::Stored(hash) => state.cached.insert(hash),
                PageChange::Removed(hash) => state.cached.remove(&hash),
            };
            if state.log.len() == LOG {
                state.log.pop_front();
            }
            state.log.push_back(change);
        }
        self.end.send_modify(|end| *end += changes.len() as u64);
    }

    /// A follower that knows nothing yet. `epoch` marks its batches.
    pub(crate) fn follow(self: &Arc<Self>, epoch: u64) -> Follower {
        Follower {
            ends: self.end.subscribe(),
            pages: self.clone(),
            epoch,
            next: None,
        }
    }
}

/// Somebody's place in the log.
#[derive(Debug)]
pub(crate) struct Follower {
    pages: Arc<Pages>,
    ends: watch::Receiver<u64>,
    epoch: u64,
    /// Changes it has seen; `None` before its first snapshot.
    next: Option<u64>,
}

impl Follower {
    /// Forgets its place: a snapshot comes next.
    pub(crate) fn restart(&mut self) {
        self.next = None;
    }

    /// Waits for something new and returns all of it. Cancel-safe.
    pub(crate) async fn news(&mut self) -> Vec<PageBatch> {
        loop {
            let next = self.next;
            // The sender lives as long as `pages`.
            let _ = self.ends.wait_for(|&end| Some(end) != next).await;
            let batches = self.read();
            if !batches.is_empty() {
                return batches;
            }
        }
    }

    fn read(&mut self) -> Vec<PageBatch> {
        let state = self.pages.lock();
        let end = *self.pages.end.borrow();
        let behind = self.next.map(|next| (end - next) as usize);
        self.next = Some(end);
        let Some(behind) = behind.filter(|&behind| behind <= state.log.len()) else {
            let cached: Vec<PageHash> = state.cached.iter().copied().collect();
            drop(state);
            return self.snapshot(end, &cached);
        };
        let log: Vec<PageChange> = state
            .log
            .range(state.log.len() - behind..)
            .copied()
            .collect();
        drop(state);
        let mut seq = end - behind as u64;
        log.chunks(BATCH)
            .map(|changes| {
                let batch = PageBatch {
                    epoch: self.epoch,
                    seq,
                    events: events(changes),
                    ..PageBatch::default()
                };
                seq += changes.len() as u64;
                batch
            })
            .collect()
    }

    fn snapshot(&self, seq: u64, cached: &[PageHash]) -> Vec<PageBatch> {
        // An empty cache is a snapshot, too.
        let count = cached.len().div_ceil(BATCH).max(1);
        let batch = |i: usize| {
            let pages = cached.chunks(BATCH).nth(i).unwrap_or_default();
            let stored = pages.iter().flat_map(|page| page.to_bytes()).collect();
            PageBatch {
                epoch: self.epoch,
                seq,
                snapshot_begin: i == 0,
                snapshot_end: i + 1 == count,
                events: vec![PageEvent {
                    event: Some(Event::Stored(stored)),
                }],
            }
        };
        (0..count).map(batch).collect()
    }
}

/// The changes, runs of one kind together.
fn events(changes: &[PageChange]) -> Vec<PageEvent> {
    let stored = |change: &PageChange| matches!(change, PageChange::Stored(_));
    let runs = changes.chunk_by(|a, b| stored(a) == stored(b));
    let event = |run: &[PageChange]| {
        let hashes = run.iter().flat_map(|change| match change {
            PageChange::Stored(hash) | PageChange::Removed(hash) => hash.to_bytes(),
        });
        let hashes = hashes.collect();
        PageEvent {
            event: Some(match run.first() {
                Some(PageChange::Removed(_)) => Event::Removed(hashes),
                _ => Event::Stored(hashes),
            }),
        }
    };
    runs.map(event).collect()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn hash(n: usize) -> PageHash {
        PageHash::from_bytes((n as u128).to_le_bytes())
    }

    fn stored(range: std::ops::Range<usize>) -> Vec<PageChange> {
        range.map(|n| PageChange::Stored(hash(n))).collect()
    }

    fn bytes(range: std::ops::Range<usize>) -> Vec<u8> {
        range.flat_map(|n| hash(n).to_bytes()).collect()
    }

    #[tokio::test]
    async fn a_snapshot_comes_first_and_changes_follow() {
        let pages = Arc::new(Pages::default());
        pages.change(&stored(0..1));
        let mut follower = pages.follow(7);
        let batches = follower.news().await;
        let expected = PageBatch {
            epoch: 7,
            seq: 1,
            snapshot_begin: true,
            snapshot_end: true,
            events: vec![PageEvent {
                event: Some(Event::Stored(bytes(0..1))),
            }],
        };
        assert_eq!(batches, [expected]);
        assert!(follower.news().now_or_never().is_none());

        pages.change(&stored(1..3));
        pages.change(&[PageChange::Removed(hash(0))]);
        let batches = follower.news().await;
        assert_eq!(batches.len(), 1);
        assert_eq!((batches[0].seq, batches[0].snapshot_begin), (1, false));
        let events: Vec<_> = batches[0].events.iter().map(|e| e.event.clone()).collect();
        assert_eq!(
            events,
            [
                Some(Event::Stored(bytes(1..3))),
                Some(Event::Removed(bytes(0..1)))
            ]
        );
    }

    #[tokio::test]
    async fn a_slow_follower_gets_the_set_in_bounded_frames() {
        let pages = Arc::new(Pages::default());
        let mut follower = pages.follow(1);
        follower.news().await;
        pages.change(&stored(0..LOG));
        pages.change(&[PageChange::Removed(hash(0))]);
        let batches = follower.news().await;
        assert!(batches[0].snapshot_begin && batches.last().unwrap().snapshot_end);
        let mut count = 0;
        for batch in &batches {
            assert_eq!(batch.seq, LOG as u64 + 1);
            assert!(prost::Message::encoded_len(batch) < 64 << 10);
            match &batch.events[0].event {
                Some(Event::Stored(hashes)) => count += hashes.len() / 16,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(count, LOG - 1);
        assert_eq!(pages.lock().log.len(), LOG);
    }

    #[tokio::test]
    async fn whoever_starts_again_gets_a_snapshot() {
        let pages = Arc::new(Pages::default());
        let mut follower = pages.follow(1);
        assert!(follower.news().await[0].snapshot_begin);
        follower.restart();
        assert!(follower.news().await[0].snapshot_begin);
    }
}
