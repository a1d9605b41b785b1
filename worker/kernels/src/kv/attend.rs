//! The phase that attends.

use std::ops::Range;

use super::plan::{Block, Item, Plan};
use super::{Heads, KvPool};
use crate::Isa;
use crate::attention::{
    Keys, MAX_QUERIES, Pages, Query, SPAN, attend, attend_first, attend_spans, merge_spans,
    partial_width, query_words,
};
use crate::pool::Scatter;
use crate::quant::Activations;
use crate::team::{Scratch, Team};

impl KvPool {
    /// Attends with the queries of every row; the results become the first rows of `out`. Sequences
    /// that begin with the same pages attend to these together, while they are in the cache
    /// (Hydragen, Juravsky et al. 2024); that changes no bit.
    ///
    /// # Panics
    /// When the shapes do not fit, or a page is not of the pool.
    pub fn attend(
        &self,
        team: &mut Team,
        layer: usize,
        plan: &mut Plan,
        queries: &[u32],
        out: &mut Activations,
    ) {
        let (heads, isa, rows) = (self.heads, team.isa, plan.rows());
        assert!(plan.heads() == heads && queries.len() >= rows * heads.query_words());
        assert!(out.k() == heads.q * heads.dim && rows <= out.rows());
        let phase = Phase {
            partials: Scatter::new(&mut plan.partials),
            plan,
            kv: self,
            layer,
            isa,
            queries,
            out,
        };
        let items = phase.plan.items.len();
        team.pool
            .phase_with(&mut team.scratch, items, |scratch, index| {
                let item = &phase.plan.items[index];
                // A thread takes items in their order, but for those of another's stretch.
                let next = phase.plan.items.get(index + 1).unwrap_or(item);
                let then = phase.keys(next, next.heads.start);
                match item.split {
                    None => phase.whole(item, then, scratch),
                    Some(split) => phase.piece(item, split, then, scratch),
                }
            });
    }
}

/// What the items of a phase have in common.
struct Phase<'a> {
    kv: &'a KvPool,
    plan: &'a Plan,
    layer: usize,
    isa: Isa,
    queries: &'a [u32],
    partials: Scatter<f32>,
    out: &'a Activations,
}

impl<'a> Phase<'a> {
    fn pages(&self, item: &Item, head: usize) -> Pages<'a> {
        let KvPool {
            arena,
            shape,
            pages,
            ..
        } = self.kv;
        Pages {
            pool: &arena.as_words()[..shape.words(*pages)],
            shape: *shape,
            table: self.plan.table(item),
            layer: self.layer,
            head,
        }
    }

    /// Where an item begins to read.
    fn keys(&self, item: &Item, head: usize) -> Keys {
        self.pages(item, head).span(item.spans.start)
    }

    /// The queries of a block that attend to a head, of which the results lie beside those of the
    /// query heads `all`; their number.
    fn ask(
        &self,
        block: &Block,
        head: usize,
        all: &Range<usize>,
        queries: &mut [Query<'a>],
    ) -> usize {
        let Heads { q, dim, .. } = self.kv.heads;
        let members = self.kv.heads.members(head..head + 1);
        let count = block.rows * members.len();
        for (i, query) in queries[..count].iter_mut().enumerate() {
            let (row, member) = (i / members.len(), members.start + i % members.len());
            let words = query_words(dim);
            let at = ((block.row + row) * q + member) * words;
            let out = (row * all.len() + member - all.start) * dim;
            let len = block.position + row + 1;
            *query = Query::new(&self.queries[at..at + words], len, out);
        }
        count
    }

    /// Passes the results of a block on, which lie row by row.
    fn put(&self, block: &Block, all: &Range<usize>, results: &[f32]) {
        let dim = self.kv.heads.dim;
        for (i, result) in results.chunks_exact(all.len() * dim).enumerate() {
            let (row, first) = (block.row + i, all.start * dim);
            // SAFETY: an item, or the last of its pieces, has its own rows and heads.
            unsafe { self.out.write_shared(self.isa, row, first, result) };
        }
    }

    /// All spans of some heads of a block.
    fn whole(&self, item: &Item, then: Keys, scratch: &mut Scratch) {
        let all = self.kv.heads.members(item.heads.clone());
        for block in self.plan.blocks(item) {
            let results = &mut scratch.tile[..block.rows * all.len() * self.kv.heads.dim];
            for head in item.heads.clone() {
                let mut queries = [Query::default(); MAX_QUERIES];
                let count = self.ask(block, head, &all, &mut queries);
                let then = match head + 1 < item.heads.end {
                    true => self.keys(item, head + 1),
                    false => then,
                };
                let (queries, pages) = (&queries[..count], self.pages(item, head));
                let attention = &mut scratch.attention;
                attend(self.isa, queries, pages, then, attention, results);
            }
            self.put(block, &all, results);
        }
    }

    /// Some spans of a head of blocks; the rest as well of each of which this is the last piece.
    fn piece(&self, item: &Item, first_split: usize, then: Keys, scratch: &mut Scratch) {
        let (head, isa) = (item.heads.start, self.isa);
        let all = self.kv.heads.members(item.heads.clone());
        let mut queries = [Query::default(); MAX_QUERIES];
        let mut count = 0;
        for block in self.plan.blocks(item) {
            count += self.ask(block, head, &all, &mut queries[count..]);
        }
        let (width, pages) = (partial_width(self.kv.heads.dim), self.pages(item, head));
        let (of_item, attention) = (&mut queries[..count], &mut scratch.attention);
        let splits = &self.plan.splits[first_split..];
        if item.blocks.len() > 1 {
            for (i, query) in of_item.iter_mut().enumerate() {
                // The pages of the first block are those of the others as far as the item goes.
                (query.len, query.out) = (item.spans.end * SPAN, i * width);
            }
            // SAFETY: a piece has its own partial results.
            let partials = unsafe { self.partials.part(splits[0].begin.start, count * width) };
            let spans = (pages, item.spans.end);
            attend_first(isa, of_item, spans, then, attention, partials);
        } else {
            let (width, before) = (count * width, item.spans.start - splits[0].common);
            let start = splits[0].rest.start + before * width;
            // SAFETY: as above.
            let partials = unsafe { self.partials.part(start, item.spans.len() * width) };
            let spans = (pages, item.spans.clone());
            attend_spans(isa, of_item, spans, then, attention, partials);
        }
        for (block, split) in self.plan.blocks(item).zip(splits) {
            if !split.done() {
                continue;
            }
            let count = self.ask(block, head, &all, &mut queries);
            let results = &mut scratch.tile[..count * self.kv.heads.dim];
            // SAFETY: all pieces are done, and this is the only one that merges them.
            let part = |of: &Range<usize>| unsafe { &*self.partials.part(of.start, of.len()) };
            let begin = (split.common > 0).then(|| part(&split.begin));
            let partials = (begin, split.common, part(&split.rest));
            merge_spans(isa, &queries[..count], partials, results);
            self.put(block, &all, results);
        }
    }
}
