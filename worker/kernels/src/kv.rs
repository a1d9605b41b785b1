//! The pool of KV pages of a model, and the phases that fill it and attend to it.

use std::io;

use crate::Isa;
use crate::arena::Arena;
use crate::attention::{
    MAX_QUERIES, PAGE, Query, Scratch, append_key, append_value, attend, page_words,
};
use crate::pool::{Pool, Scatter};
use crate::simd::LANES;

/// What divides the width of a head.
pub const HEAD_MULTIPLE: usize = LANES;

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key–value heads; divides `q`.
    pub kv: usize,
    /// Width of a head, a multiple of [`HEAD_MULTIPLE`].
    pub dim: usize,
}

impl Heads {
    /// Columns of a row of q, k and v, one after the other.
    pub fn qkv(&self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }
}

/// Pages of every layer, `[layer][page][kv head]`, all of one size.
pub struct KvPool {
    arena: Arena,
    heads: Heads,
    pages: usize,
}

/// Rows of one sequence at consecutive positions.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// First row.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position of the first row.
    pub position: usize,
    /// The sequence's pages.
    pub pages: &'a [u32],
}

impl KvPool {
    /// Bytes of one page of all layers.
    pub fn page_bytes(heads: Heads, layers: usize) -> usize {
        layers * heads.kv * page_words(heads.dim) * 4
    }

    /// `pages` zeroed pages for each of `layers` layers.
    pub fn new(heads: Heads, layers: usize, pages: usize) -> io::Result<Self> {
        let arena = Arena::new(Self::page_bytes(heads, layers) * pages)?;
        Ok(Self {
            arena,
            heads,
            pages,
        })
    }

    fn layer_words(&self) -> usize {
        self.pages * self.heads.kv * page_words(self.heads.dim)
    }

    fn layer_mut(&mut self, layer: usize) -> &mut [u32] {
        let words = self.layer_words();
        &mut self.arena.as_words_mut()[layer * words..][..words]
    }

    /// Passes each row's q, k and v through `each` (which may normalise and rotate a head in
    /// place: `each(row, head, values)`, heads numbered q first, then k, then v), and stores
    /// keys and values.
    ///
    /// # Panics
    /// When a run has no page for a row, or a page is not of the pool.
    pub fn append(
        &mut self,
        pool: &mut Pool,
        layer: usize,
        runs: &[Run<'_>],
        qkv: &mut [f32],
        each: &(dyn Fn(usize, usize, &mut [f32]) + Sync),
    ) {
        let Heads { q, kv, dim } = self.heads;
        let (width, words, pages) = (self.heads.qkv(), page_words(dim), self.pages);
        let keys = Scatter::new(self.layer_mut(layer));
        let qkv = Scatter::new(qkv);
        pool.phase(q + kv, |head| {
            for run in runs {
                for i in 0..run.rows {
                    let row = run.row + i;
                    // SAFETY: an item has the columns and the pages of its own head alone.
                    let values = unsafe { qkv.part(row * width + head * dim, dim) };
                    each(row, head, values);
                    let Some(head) = head.checked_sub(q) else {
                        continue;
                    };
                    let position = run.position + i;
                    let page = run.pages[position / PAGE] as usize;
                    assert!(page < pages);
                    // SAFETY: as above.
                    let (page, value) = unsafe {
                        (
                            keys.part((page * kv + head) * words, words),
                            qkv.part(row * width + (q + kv + head) * dim, dim),
                        )
                    };
                    each(row, q + kv + head, value);
                    append_key(page, position % PAGE, values);
                    append_value(page, position % PAGE, value);
                }
            }
        });
    }

    /// Attends with the queries of every row: `out[row * q * dim + head * dim]`.
    ///
    /// # Panics
    /// When a run has no page for a row, or a page is not of the pool.
    pub fn attend(
        &self,
        pool: &mut Pool,
        isa: Isa,
        layer: usize,
        runs: &[Run<'_>],
        qkv: &[f32],
        out: &mut [f32],
    ) {
        let Heads { q, kv, dim } = self.heads;
        let (group, width, words) = (q / kv, self.heads.qkv(), page_words(dim));
        let layer = &self.arena.as_words()[layer * self.layer_words()..][..self.layer_words()];
        let step = (MAX_QUERIES / group).max(1);
        assert!(group <= MAX_QUERIES);
        let blocks: Vec<(usize, usize)> = runs
            .iter()
            .enumerate()
            .flat_map(|(index, run)| (0..run.rows).step_by(step).map(move |first| (index, first)))
            .collect();
        let out = Scatter::new(out);
        // Long blocks first would balance better alone; late rows of a run are the longest.
        pool.phase(blocks.len() * kv, |item| {
            let (index, first) = blocks[blocks.len() - 1 - item / kv];
            let (run, head) = (&runs[index], item % kv);
            let rows = step.min(run.rows - first);
            let last = run.position + first + rows;
            let pages: Vec<&[u32]> = run.pages[..last.div_ceil(PAGE)]
                .iter()
                .map(|&page| &layer[(page as usize * kv + head) * words..][..words])
                .collect();
            let mut queries = Vec::with_capacity(rows * group);
            for i in first..first + rows {
                for g in 0..group {
                    let at = (run.row + i) * width + (head * group + g) * dim;
                    queries.push(Query {
                        q: &qkv[at..at + dim],
                        len: run.position + i + 1,
                    });
                }
            }
            let mut results = [0f32; MAX_QUERIES * 128];
            let mut wide;
            let results = if queries.len() * dim <= results.len() {
                &mut results[..queries.len() * dim]
            } else {
                wide = vec![0.0; queries.len() * dim];
                &mut wide[..]
            };
            attend(isa, &queries, &pages, &mut Scratch::new(dim), results);
            for i in 0..rows {
                let at = (run.row + first + i) * q * dim + head * group * dim;
                // SAFETY: an item has its own rows and heads.
                let out = unsafe { out.part(at, group * dim) };
                out.copy_from_slice(&results[i * group * dim..][..group * dim]);
            }
        });
    }
}
