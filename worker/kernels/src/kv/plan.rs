//! Who attends to what: made once for a step, used by every layer.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{HEAD_MULTIPLE, Heads};
use crate::attention::{MAX_QUERIES, PAGE, SPAN, partial_width};
use crate::quant::BLOCK;

/// Items that a thread gets if all cost the same.
const ITEMS: usize = 4;
/// Fewer spans are not worth a merge.
const LEAST_SPANS: usize = 2;
/// Most numbers that wait for a merge.
const PARTIALS: usize = 1 << 20;

/// Rows of one sequence at consecutive positions.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// First row; the runs cover all rows, one after the other.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position of the first row.
    pub position: usize,
    /// The sequence's pages.
    pub pages: &'a [u32],
}

/// The places and the shares of work of a step's rows.
pub struct Plan {
    heads: Heads,
    threads: usize,
    /// Page and offset of every row.
    pub(super) slots: Vec<(usize, usize)>,
    table: Vec<u32>,
    pub(super) blocks: Vec<Block>,
    /// The dearest first.
    pub(super) items: Vec<Item>,
    pub(super) splits: Vec<Split>,
    pub(super) partials: Vec<f32>,
}

/// Rows of a run whose queries attend together.
pub(super) struct Block {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) position: usize,
    table: Range<usize>,
}

/// Some key–value heads and spans of a block.
pub(super) struct Item {
    pub(super) block: usize,
    pub(super) heads: Range<usize>,
    pub(super) spans: Range<usize>,
    /// If the spans are not all that the block has.
    pub(super) split: Option<usize>,
}

/// One head of a block whose spans are several items.
pub(super) struct Split {
    pub(super) partials: Range<usize>,
    pieces: u32,
    left: AtomicU32,
}

impl Split {
    /// Says that a piece is done; true to whoever says it last, who then sees all of them.
    pub(super) fn done(&self) -> bool {
        let last = self.left.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            self.left.store(self.pieces, Ordering::Relaxed);
        }
        last
    }
}

impl Block {
    fn spans(&self) -> usize {
        (self.position + self.rows).div_ceil(SPAN)
    }

    /// Queries that attend to a key–value head.
    fn queries(&self, heads: Heads, head: usize) -> usize {
        self.rows * heads.members(head..head + 1).len()
    }

    /// What a span costs the queries of some key–value heads: one pass over keys and values for
    /// every four, as many as the registers hold.
    fn weight(&self, heads: Heads, kv: Range<usize>) -> usize {
        kv.map(|head| self.queries(heads, head).div_ceil(4)).sum()
    }
}

impl Plan {
    /// A plan for up to `rows` rows, without any.
    ///
    /// # Panics
    /// When a group has more heads than a call takes, their width is no multiple of
    /// [`HEAD_MULTIPLE`], or heads of groups that are not whole fill no blocks of activations.
    pub fn new(heads: Heads, threads: usize, rows: usize) -> Self {
        let whole = heads.q == heads.kv * heads.group;
        assert!(whole || heads.kv == 1 || heads.dim.is_multiple_of(BLOCK));
        assert!((1..=MAX_QUERIES).contains(&heads.most()));
        assert!(heads.dim.is_multiple_of(HEAD_MULTIPLE));
        let most = rows * heads.kv + ITEMS * threads;
        Self {
            heads,
            threads,
            slots: Vec::with_capacity(rows),
            table: Vec::new(),
            blocks: Vec::with_capacity(rows),
            items: Vec::with_capacity(most),
            splits: Vec::with_capacity(most),
            partials: vec![0.0; PARTIALS],
        }
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn heads(&self) -> Heads {
        self.heads
    }

    /// The pages of a block's sequence.
    pub(super) fn table(&self, block: &Block) -> &[u32] {
        &self.table[block.table.clone()]
    }

    /// Plans a step.
    ///
    /// # Panics
    /// When a run has no page for a row.
    pub fn set<'a>(&mut self, runs: impl Iterator<Item = Run<'a>>) {
        let step = (MAX_QUERIES / (self.heads.most() * self.together())).max(1);
        self.slots.clear();
        self.table.clear();
        self.blocks.clear();
        for run in runs {
            assert_eq!(run.row, self.slots.len());
            let pages = &run.pages[..(run.position + run.rows).div_ceil(PAGE)];
            let table = self.table.len()..self.table.len() + pages.len();
            self.table.extend_from_slice(pages);
            self.slots.extend(
                (run.position..run.position + run.rows)
                    .map(|position| (pages[position / PAGE] as usize, position % PAGE)),
            );
            self.blocks
                .extend((0..run.rows).step_by(step).map(|first| Block {
                    row: run.row + first,
                    rows: step.min(run.rows - first),
                    position: run.position + first,
                    table: table.clone(),
                }));
        }
        self.share();
    }

    /// Heads of an item: as many as fill whole blocks of activations.
    fn together(&self) -> usize {
        let of_one = self.heads.members(0..1).len() * self.heads.dim;
        if of_one.is_multiple_of(BLOCK) { 1 } else { 2 }
    }

    fn share(&mut self) {
        let (heads, together) = (self.heads, self.together());
        let cost = |block: &Block| block.spans() * block.weight(heads, 0..heads.kv);
        let all: usize = self.blocks.iter().map(cost).sum();
        let fair = all.div_ceil(ITEMS * self.threads);
        self.items.clear();
        self.splits.clear();
        let mut partials = 0;
        for index in 0..self.blocks.len() {
            let block = &self.blocks[index];
            let spans = block.spans();
            for head in (0..heads.kv).step_by(together) {
                let piece = (fair / block.weight(heads, head..head + 1)).max(LEAST_SPANS);
                let room = spans * block.queries(heads, head) * partial_width(heads.dim);
                let mut item = Item {
                    block: index,
                    heads: head..heads.kv.min(head + together),
                    spans: 0..spans,
                    split: None,
                };
                let fits = room <= self.partials.len() - partials;
                if self.threads == 1 || together > 1 || spans <= piece || !fits {
                    self.items.push(item);
                    continue;
                }
                let pieces = spans.div_ceil(piece) as u32;
                item.split = Some(self.splits.len());
                self.splits.push(Split {
                    partials: partials..partials + room,
                    pieces,
                    left: AtomicU32::new(pieces),
                });
                partials += room;
                for first in (0..spans).step_by(piece) {
                    self.items.push(Item {
                        spans: first..spans.min(first + piece),
                        heads: item.heads.clone(),
                        ..item
                    });
                }
            }
        }
        let blocks = &self.blocks;
        self.items.sort_unstable_by_key(|item| {
            let weight = blocks[item.block].weight(heads, item.heads.clone());
            Reverse(item.spans.len() * weight)
        });
    }
}
