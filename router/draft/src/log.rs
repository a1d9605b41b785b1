//! The texts of one router, in the order in which they were made.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::record::Record;

/// Records by ascending offset. Some are missing: what is out of date, what was forgotten, and
/// what is no text.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// The first offset that is not known.
    pub(crate) next: u64,
    /// When the newest of the records was made that went for their age or for want of room. One
    /// may be older than those before it.
    pub(crate) lost: Option<Instant>,
    records: VecDeque<Arc<Record>>,
}

impl Log {
    /// Adds a record; its offset is at least `next`.
    pub(crate) fn push(&mut self, record: Arc<Record>) {
        debug_assert!(record.stamp.offset >= self.next);
        self.next = record.stamp.offset + 1;
        self.records.push_back(record);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.records.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn front(&self) -> Option<&Arc<Record>> {
        self.records.front()
    }

    pub(crate) fn pop_front(&mut self) -> Option<Arc<Record>> {
        let gone = self.records.pop_front();
        self.lost = self.lost.max(gone.as_ref().map(|record| record.made));
        gone
    }

    /// Lets go of the records that are not wanted; gives the tokens that they had.
    pub(crate) fn retain(&mut self, wanted: impl Fn(&Record) -> bool) -> usize {
        let mut tokens = 0;
        self.records.retain(|record| {
            let stays = wanted(record);
            tokens += if stays { 0 } else { record.tokens().len() };
            stays
        });
        tokens
    }

    /// The wanted records from an offset on, of about `most` tokens, and the offset after them;
    /// takes what they have from `most`.
    pub(crate) fn read(
        &self,
        from: u64,
        most: &mut usize,
        wanted: impl Fn(&Record) -> bool,
    ) -> (Vec<Arc<Record>>, u64) {
        let first = self.records.partition_point(|r| r.stamp.offset < from);
        let mut found = Vec::new();
        for record in self.records.range(first..) {
            if !wanted(record) {
                continue;
            }
            if *most == 0 {
                return (found, record.stamp.offset);
            }
            *most = most.saturating_sub(record.tokens().len() + 1);
            found.push(record.clone());
        }
        (found, self.next.max(from))
    }
}
