//! The pool of KV pages of a model, and the phases that fill it and attend to it.

mod attend;
mod plan;
mod prefix;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;

pub use plan::{Plan, Run};

use crate::arena::Arena;
pub use crate::attention::KvType;
use crate::attention::{
    PoolShape, append_key, append_value, expect_key, prepare_query, query_words,
};
use crate::gemm::{Linear, Outputs, ROW_BLOCK, Write};
use crate::pool::Scatter;
use crate::quant::{Activations, GROUP};
use crate::simd::LANES;
use crate::team::Team;

/// Rows whose keys memory is asked for before they are stored.
const AHEAD: usize = 2;

/// What divides the width of a head.
pub const HEAD_MULTIPLE: usize = LANES;

/// Heads of an attention layer, or some of them, one after the other: a group of query heads
/// attends to each key–value head. The first and the last group need not be whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key–value heads.
    pub kv: usize,
    /// Width of a head, a multiple of [`HEAD_MULTIPLE`].
    pub dim: usize,
    /// Query heads of a whole group.
    group: usize,
    /// Query heads that the first group lacks.
    lacks: usize,
}

impl Heads {
    /// All heads of a layer.
    ///
    /// # Panics
    /// When the query heads are no whole groups.
    pub const fn new(q: usize, kv: usize, dim: usize) -> Self {
        assert!(q > 0 && q.is_multiple_of(kv));
        Self {
            q,
            kv,
            dim,
            group: q / kv,
            lacks: 0,
        }
    }

    /// The query heads `q` and those that they attend to, of a layer of these heads.
    ///
    /// # Panics
    /// When there are none, or the layer has no such heads.
    pub fn part(&self, q: Range<usize>) -> Self {
        assert!(!q.is_empty() && q.end <= self.q && self.lacks == 0);
        let first = q.start / self.group;
        Self {
            q: q.len(),
            kv: q.end.div_ceil(self.group) - first,
            lacks: q.start - first * self.group,
            ..*self
        }
    }

    /// The query heads that attend to so many key–value heads.
    pub(crate) fn members(&self, kv: Range<usize>) -> Range<usize> {
        let start = (kv.start * self.group).saturating_sub(self.lacks);
        start..(kv.end * self.group - self.lacks).min(self.q)
    }

    /// The most query heads of a group.
    fn most(&self) -> usize {
        let of = |head| self.members(head..head + 1).len();
        (0..self.kv).map(of).max().unwrap_or(0)
    }

    /// Columns of a row of q, k and v, one after the other.
    pub fn qkv(&self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }

    /// Words of the queries of a row, ready to attend with.
    pub fn query_words(&self) -> usize {
        self.q * query_words(self.dim)
    }
}

fn shape(kv: KvType, heads: Heads, layers: usize) -> PoolShape {
    PoolShape {
        kv,
        layers,
        heads: heads.kv,
        dim: heads.dim,
    }
}

/// Pages of every layer, all of one size, where [`PoolShape`] puts them.
pub struct KvPool {
    arena: Arena,
    heads: Heads,
    shape: PoolShape,
    pages: usize,
}

impl KvPool {
    /// Bytes of one page of all layers.
    pub fn page_bytes(kv: KvType, heads: Heads, layers: usize) -> usize {
        shape(kv, heads, layers).page_words() * 4
    }

    /// `pages` zeroed pages for each of `layers` layers.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(kv: KvType, heads: Heads, layers: usize, pages: usize) -> io::Result<Self> {
        let shape = shape(kv, heads, layers);
        Ok(Self {
            arena: Arena::new(shape.words(pages) * 4)?,
            heads,
            shape,
            pages,
        })
    }

    /// Projects rows to queries, keys and values: passes each head of each row through
    /// `each(row, head, values)`, heads numbered q first, then k, then v, which may add a bias,
    /// normalise and rotate in place; stores keys and values in their pages and queries, ready
    /// to attend with, in `queries`, row by row.
    ///
    /// # Panics
    /// When the shapes do not fit, or a page is not of the pool.
    pub fn project(
        &mut self,
        team: &mut Team,
        layer: usize,
        plan: &Plan,
        (linear, acts): (Linear<'_>, &Activations),
        queries: &mut [u32],
        each: &(dyn Fn(usize, usize, &mut [f32]) + Sync),
    ) {
        let (Heads { q, kv, dim, .. }, rows, isa) = (self.heads, plan.rows(), team.isa);
        let (shape, pages) = (self.shape, self.pages);
        let (ty, half) = (shape.kv, shape.kv.half_words(dim));
        assert!(linear.n() == self.heads.qkv() && linear.takes(acts, rows));
        assert!(plan.heads() == self.heads && queries.len() >= rows * self.heads.query_words());
        assert!(layer < shape.layers && plan.slots.iter().all(|&(page, _)| page < pages));
        let store = Scatter::new(self.arena.as_words_mut());
        let queries = Scatter::new(queries);
        // Many rows are two blocks at least, for the threads to have even shares.
        let block = rows.div_ceil(2).next_multiple_of(GROUP);
        let block = block.clamp(2 * GROUP, ROW_BLOCK);
        let blocks = rows.div_ceil(block);
        // Two tokens share a word of bf16 values, so one item stores all values of a head, in order.
        let items = kv + blocks * (q + kv);
        team.pool
            .phase_with(&mut team.scratch, items, |scratch, item| {
                let (head, rows) = match item.checked_sub(kv) {
                    None => (q + kv + item, 0..rows),
                    Some(item) => {
                        let first = item % blocks * block;
                        (item / blocks, first..rows.min(first + block))
                    }
                };
                let keys = |row: usize| {
                    let (page, offset) = plan.slots[row];
                    (shape.at(layer, page, (head - q) % kv), offset)
                };
                let expect = |row: usize, end: usize| {
                    if (q..q + kv).contains(&head) && row < end {
                        let (at, offset) = keys(row);
                        expect_key(isa, ty, store.at(at), offset, dim);
                    }
                };
                for first in rows.clone().step_by(ROW_BLOCK) {
                    let rows = first..rows.end.min(first + ROW_BLOCK);
                    let tile = &mut scratch.tile[..rows.len() * dim];
                    let out = Outputs {
                        start: tile.as_mut_ptr(),
                        stride: dim,
                        write: Write::Set,
                    };
                    let (columns, panel) = (head * dim..(head + 1) * dim, &mut scratch.panel);
                    (first..first + AHEAD).for_each(|row| expect(row, rows.end));
                    // SAFETY: the shapes fit, and the tile is the item's own.
                    unsafe { linear.columns(isa, columns, acts, rows.clone(), out, panel) };
                    for (row, values) in rows.clone().zip(tile.chunks_exact_mut(dim)) {
                        expect(row + AHEAD, rows.end);
                        each(row, head, values);
                        if head < q {
                            let words = query_words(dim);
                            // SAFETY: an item has its own rows and head.
                            let query = unsafe { queries.part((row * q + head) * words, words) };
                            prepare_query(isa, ty, values, query);
                            continue;
                        }
                        let (at, offset) = keys(row);
                        // SAFETY: keys and values are halves of a page. An item has the keys of
                        // its own rows, or all values of its head.
                        unsafe {
                            if head < q + kv {
                                append_key(isa, ty, store.at(at), offset, values);
                            } else {
                                append_value(isa, ty, store.part(at + half, half), offset, values);
                            }
                        }
                    }
                }
            });
    }
}
