//! Who attends to what: made once for a step, used by every layer, but for a last one that goes on
//! with fewer rows.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::prefix::{Family, families};
use super::{HEAD_MULTIPLE, Heads};
use crate::attention::{MAX_QUERIES, PAGE, SPAN, partial_width};
use crate::quant::BLOCK;

/// Items that a thread gets if all cost the same.
const ITEMS: usize = 4;
/// Fewer spans are not worth a merge.
const LEAST_SPANS: usize = 2;
/// Most numbers that wait for a merge.
const PARTIALS: usize = 1 << 20;

/// The next rows of a step: those of one sequence at consecutive positions.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// How many.
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
    blocks: Vec<Block>,
    /// The blocks, those with a common beginning beside each other.
    order: Vec<usize>,
    families: Vec<Family>,
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

/// Some key–value heads and spans of a block, or of several that have them in common.
pub(super) struct Item {
    /// Their places in the order.
    pub(super) blocks: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) spans: Range<usize>,
    /// If the spans are not all that the blocks have: the split of the first, which those of the
    /// others follow.
    pub(super) split: Option<usize>,
}

/// One head of a block whose spans are several items.
pub(super) struct Split {
    /// The first spans, which are in common with others.
    pub(super) common: usize,
    /// Where what is left of those lies, and of each other span.
    pub(super) begin: Range<usize>,
    pub(super) rest: Range<usize>,
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
    /// Spans that the block sees.
    pub(super) fn spans(&self) -> usize {
        (self.position + self.rows).div_ceil(SPAN)
    }

    /// Queries that attend to a key–value head.
    pub(super) fn queries(&self, heads: Heads, head: usize) -> usize {
        self.rows * heads.members(head..head + 1).len()
    }

    /// What a span costs the queries of all key–value heads.
    fn weight(&self, heads: Heads) -> usize {
        let of_head = |head| passes(self.queries(heads, head));
        (0..heads.kv).map(of_head).sum()
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
            order: Vec::with_capacity(rows),
            families: Vec::with_capacity(rows),
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

    /// The pages of the sequence of an item's first block.
    pub(super) fn table(&self, item: &Item) -> &[u32] {
        let block = &self.blocks[self.order[item.blocks.start]];
        &self.table[block.table.clone()]
    }

    /// Plans a step, whose rows are those of the runs, one after the other. No two of them have one place
    /// in a page.
    ///
    /// # Panics
    /// When a run has no page for a row.
    pub fn set<'a>(&mut self, runs: impl Iterator<Item = Run<'a>>) {
        let step = (MAX_QUERIES / (self.heads.most() * self.together())).max(1);
        self.slots.clear();
        self.table.clear();
        self.blocks.clear();
        for run in runs {
            let row = self.slots.len();
            let pages = &run.pages[..(run.position + run.rows).div_ceil(PAGE)];
            let table = self.table.len()..self.table.len() + pages.len();
            self.table.extend_from_slice(pages);
            self.slots.extend(
                (run.position..run.position + run.rows)
                    .map(|position| (pages[position / PAGE] as usize, position % PAGE)),
            );
            self.blocks
                .extend((0..run.rows).step_by(step).map(|first| Block {
                    row: row + first,
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

    /// The blocks of an item.
    pub(super) fn blocks(&self, item: &Item) -> impl Iterator<Item = &Block> {
        let order = self.order[item.blocks.clone()].iter();
        order.map(|&block| &self.blocks[block])
    }

    /// Orders the blocks, and finds those with a common beginning.
    fn set_order(&mut self) {
        let (blocks, table, most) = (&self.blocks, &self.table, self.heads.most());
        let queries = |block: usize| blocks[block].rows * most;
        // A call takes two of them at least.
        let few = |&block: &usize| 2 * queries(block) <= MAX_QUERIES;
        self.order.clear();
        self.order.extend((0..blocks.len()).filter(few));
        self.families.clear();
        if self.together() == 1 {
            let whole = |block: usize| {
                let spans = blocks[block].position / SPAN;
                &table[blocks[block].table.clone()][..spans * (SPAN / PAGE)]
            };
            let (order, found) = (&mut self.order, &mut self.families);
            families(order, whole, queries, MAX_QUERIES, found);
        }
        let many = (0..blocks.len()).filter(|block| !few(block));
        self.order.extend(many);
    }

    fn share(&mut self) {
        self.set_order();
        let heads = self.heads;
        let cost = |block: &Block| block.spans() * block.weight(heads);
        let all: usize = self.blocks.iter().map(cost).sum();
        let fair = all.div_ceil(ITEMS * self.threads);
        self.items.clear();
        self.splits.clear();
        let (mut place, mut used) = (0, 0);
        let families = std::mem::take(&mut self.families);
        let mut next = families.iter().peekable();
        while place < self.order.len() {
            let (members, common) = match next.next_if(|family| family.members.start == place) {
                // What is in common is one item: half of what a thread has to do at most.
                Some(family) if family.spans * passes(family.queries) <= ITEMS / 2 * fair => {
                    (family.members.clone(), family.spans)
                }
                _ => (place..place + 1, 0),
            };
            place = members.end;
            for head in (0..heads.kv).step_by(self.together()) {
                self.add(members.clone(), common, head, fair, &mut used);
            }
        }
        self.families = families;
        let (blocks, order) = (&self.blocks, &self.order);
        self.items.sort_unstable_by_key(|item| {
            let of_item = || {
                order[item.blocks.clone()]
                    .iter()
                    .map(|&block| &blocks[block])
            };
            let of_head = |head| passes(of_item().map(|block| block.queries(heads, head)).sum());
            Reverse(item.spans.len() * item.heads.clone().map(of_head).sum::<usize>())
        });
    }

    /// Adds the items of a head of blocks that begin with `common` spans: of spans for `fair` passes,
    /// where they can be split. `used` is how much of the partial results is taken.
    fn add(
        &mut self,
        members: Range<usize>,
        common: usize,
        head: usize,
        fair: usize,
        used: &mut usize,
    ) {
        let (heads, together) = (self.heads, self.together());
        let (blocks, order) = (&self.blocks, &self.order);
        let block = |place: usize| &blocks[order[place]];
        // Spans, queries, and what a span leaves of these.
        let own = |place| block(place).spans() - common;
        let queries = |place| block(place).queries(heads, head);
        let width = |place| queries(place) * partial_width(heads.dim);
        let pieces = |spans: Range<usize>, queries: usize| {
            let (end, piece) = (spans.end, (fair / passes(queries)).max(LEAST_SPANS));
            let piece_from = move |first| first..end.min(first + piece);
            spans.step_by(piece).map(piece_from)
        };
        let begin = match common {
            0 => 0,
            _ => members.clone().map(width).sum(),
        };
        let room = begin + members.clone().map(|m| own(m) * width(m)).sum::<usize>();
        let long = || pieces(0..own(members.start), queries(members.start)).count() > 1;
        let split = common > 0 || (self.threads > 1 && long());
        if together > 1 || !split || room > self.partials.len() - *used {
            self.items.extend(members.map(|place| Item {
                blocks: place..place + 1,
                heads: head..heads.kv.min(head + together),
                spans: 0..block(place).spans(),
                split: None,
            }));
            return;
        }
        if common > 0 {
            self.items.push(Item {
                blocks: members.clone(),
                heads: head..head + 1,
                spans: 0..common,
                split: Some(self.splits.len()),
            });
        }
        // Where what is left of the next block lies: of the first spans, and of its own.
        let (mut first, mut rest) = (*used, *used + begin);
        for place in members {
            let width = width(place);
            let own_pieces = pieces(common..block(place).spans(), queries(place));
            let count = u32::from(common > 0) + own_pieces.clone().count() as u32;
            self.items.extend(own_pieces.map(|spans| Item {
                blocks: place..place + 1,
                heads: head..head + 1,
                spans,
                split: Some(self.splits.len()),
            }));
            let end = rest + own(place) * width;
            self.splits.push(Split {
                common,
                begin: first..first + width,
                rest: rest..end,
                pieces: count,
                left: AtomicU32::new(count),
            });
            (first, rest) = (first + width, end);
        }
        *used = rest;
    }
}

/// Passes over keys and values: one for every four queries, as many as the registers hold.
fn passes(queries: usize) -> usize {
    queries.div_ceil(4)
}
