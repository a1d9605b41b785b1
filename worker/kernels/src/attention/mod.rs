//! Attention over paged keys and values.
//!
//! A page holds [`PAGE`] tokens of one key–value head, in the order that attention reads them
//! (`store.rs`).
//!
//! A query attends span by span, 64 tokens each: scores, their maximum, weights, the
//! weighted sum of the values; spans are merged in ascending order by log-sum-exp (Rabe and
//! Staats 2021). Queries and weights are rounded to bf16 or int16, as keys and values are or can be
//! read, so that a product of pairs is one instruction where there is one. Every sum runs in one fixed order
//! that depends on the query's own length only, so batching, chunking and page placement
//! change no bit.

mod kept;
mod kernel;
mod merge;
mod store;
#[cfg(test)]
mod tests;
mod weights;

use std::ops::Range;

use kernel::{begin, some, whole};
use merge::merged;
pub use store::KvType;
use store::quantise_query;
pub(crate) use store::{append_key, append_value, expect_key};

use crate::Isa;
use crate::bf16::{dispatch_pairs, pairs};
use crate::lines::Lines;
use crate::simd::{LANES, Lanes, dispatch};

/// Tokens in a page.
pub(crate) const PAGE: usize = shoal_core::PAGE_TOKENS;
/// Tokens whose scores share one maximum.
pub(crate) const SPAN: usize = 2 * PAGE;
/// Most queries of one call, and of one key–value head.
pub const MAX_QUERIES: usize = 32;

/// What a query is multiplied with, so that weights are powers of two of the scores.
pub(crate) fn query_scale(head_dim: usize) -> f32 {
    std::f32::consts::LOG2_E / (head_dim as f32).sqrt()
}

/// Words of a query that is ready to attend with: its pairs and its scale.
pub(crate) const fn query_words(head_dim: usize) -> usize {
    head_dim / 2 + 1
}

/// Makes a rotated query head ready to attend with, to what is kept as `kv`.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn prepare_query(isa: Isa, kv: KvType, query: &mut [f32], out: &mut [u32]) {
    scale(isa, query, query_scale(query.len()));
    let (words, last) = out.split_at_mut(query.len() / 2);
    let scale = match kv {
        KvType::Bf16 => {
            pairs(isa, query, words);
            1.0
        }
        KvType::Int16 | KvType::Int8 => quantise_query(isa, query, words),
    };
    last[0] = scale.to_bits();
}

fn scale(isa: Isa, x: &mut [f32], by: f32) {
    // SAFETY: the kernel needs the features alone.
    dispatch!(isa, scaled::<_>(x: &mut [f32], by: f32));
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn scaled<L: Lanes>(x: &mut [f32], by: f32) {
    for x in x.as_chunks_mut::<LANES>().0 {
        // SAFETY: the contract of this function, and sixteen numbers.
        unsafe { L::load(x.as_ptr()).mul(L::splat(by)).store(x.as_mut_ptr()) };
    }
}

/// One query head of one row.
#[derive(Clone, Copy, Default)]
pub(crate) struct Query<'a> {
    /// Its pairs, as [`prepare_query`] made them.
    pub(crate) q: &'a [u32],
    /// What they were divided by.
    pub(crate) scale: f32,
    /// Tokens it sees: its position + 1.
    pub(crate) len: usize,
    /// Where its result begins.
    pub(crate) out: usize,
}

impl<'a> Query<'a> {
    /// What [`prepare_query`] left, by a row that sees `len` tokens; its result begins at `out`.
    pub(crate) fn new(words: &'a [u32], len: usize, out: usize) -> Self {
        let (q, scale) = words.split_at(words.len() - 1);
        Self {
            q,
            scale: f32::from_bits(scale[0]),
            len,
            out,
        }
    }

    fn head_dim(&self) -> usize {
        2 * self.q.len()
    }
}

/// Where the pages of a pool lie: `[page / 8][layer][page % 8][head]`.
///
/// What a layer reads of a sequence lies in long runs, yet eight pages of all layers are
/// neighbours: the system is asked for memory little by little as the pool fills, not for a huge
/// page of every layer at once, which takes as long as a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolShape {
    pub(crate) kv: KvType,
    pub(crate) layers: usize,
    /// Key–value heads.
    pub(crate) heads: usize,
    /// Width of a head.
    pub(crate) dim: usize,
}

impl PoolShape {
    /// Pages whose layers alternate.
    const RUN: usize = 8;

    /// Words of a page of all layers.
    pub(crate) fn page_words(&self) -> usize {
        self.layers * self.heads * self.kv.page_words(self.dim)
    }

    /// Words of so many pages.
    pub(crate) fn words(&self, pages: usize) -> usize {
        pages.next_multiple_of(Self::RUN) * self.page_words()
    }

    /// Pages that so many words hold.
    fn pages(&self, words: usize) -> usize {
        words / self.words(Self::RUN) * Self::RUN
    }

    /// Where a page of a head of a layer begins.
    #[inline(always)]
    pub(crate) fn at(&self, layer: usize, page: usize, head: usize) -> usize {
        let (run, page) = (page / Self::RUN, page % Self::RUN);
        let page = (run * self.layers + layer) * Self::RUN + page;
        (page * self.heads + head) * self.kv.page_words(self.dim)
    }
}

/// The pages of a sequence for one key–value head of a layer.
#[derive(Clone, Copy)]
pub(crate) struct Pages<'a> {
    pub(crate) pool: &'a [u32],
    pub(crate) shape: PoolShape,
    /// The pages of the sequence.
    pub(crate) table: &'a [u32],
    pub(crate) layer: usize,
    pub(crate) head: usize,
}

impl Pages<'_> {
    /// Whether there are pages for `tokens` of heads of this width, all inside the pool.
    fn hold(&self, tokens: usize, hd: usize) -> bool {
        let count = self.shape.pages(self.pool.len());
        (self.layer < self.shape.layers && self.head < self.shape.heads && hd == self.shape.dim)
            && tokens <= self.table.len() * PAGE
            && self.table.iter().all(|&page| (page as usize) < count)
    }

    /// The pages of a span; its last for those beyond the sequence.
    #[inline(always)]
    pub(crate) fn span(&self, index: usize) -> Keys {
        std::array::from_fn(|i| {
            let page = (index * SPAN / PAGE + i).min(self.table.len() - 1);
            let at = self
                .shape
                .at(self.layer, self.table[page] as usize, self.head);
            self.pool.as_ptr().wrapping_add(at)
        })
    }

    /// What is read after span `index` of `spans`: the next one, or what comes `then`.
    #[inline(always)]
    fn after(&self, index: usize, spans: &Range<usize>, then: Keys) -> Keys {
        match index + 1 < spans.end {
            true => self.span(index + 1),
            false => then,
        }
    }
}

/// Where the pages of a span begin, which is where their keys do.
pub(crate) type Keys = [*const u32; SPAN / PAGE];

/// Room for a pair, whatever it is multiplied as.
type Place = [f32; 2];

/// Room for the intermediate results of one call.
pub(crate) struct Scratch {
    /// Pairs of the queries.
    queries: Lines,
    /// Pairs of the weights that the scores become.
    weights: Lines,
    scores: Lines,
    span: Lines,
}

impl Scratch {
    /// For heads of this width.
    pub(crate) fn new(head_dim: usize) -> Self {
        Self {
            queries: Lines::new(MAX_QUERIES * head_dim),
            weights: Lines::new(MAX_QUERIES * SPAN),
            scores: Lines::new(MAX_QUERIES * SPAN),
            span: Lines::new(MAX_QUERIES * head_dim),
        }
    }
}

fn check(queries: &[Query<'_>], pages: Pages<'_>, scratch: &Scratch) {
    let hd = queries[0].head_dim();
    assert!(queries.len() <= MAX_QUERIES && hd.is_multiple_of(LANES));
    assert!(scratch.span.len() >= queries.len() * hd);
    assert!(scratch.queries.len() >= queries.len() * hd);
    assert!(queries.iter().all(|q| q.head_dim() == hd && q.len > 0));
    assert!(pages.hold(longest(queries), hd));
}

fn longest(queries: &[Query<'_>]) -> usize {
    queries.iter().map(|q| q.len).max().unwrap_or(0)
}

fn check_out(queries: &[Query<'_>], out: &[f32]) {
    let hd = queries[0].head_dim();
    assert!(
        queries
            .iter()
            .all(|q| q.out <= out.len() && hd <= out.len() - q.out)
    );
}

/// Attends with 1 to [`MAX_QUERIES`] queries of one sequence to one key–value head. Memory is asked
/// for the keys of the span that the thread reads `then`, wherever they are.
///
/// # Panics
/// When shapes do not fit, a query sees no token, or its pages are missing.
pub(crate) fn attend(
    isa: Isa,
    queries: &[Query<'_>],
    pages: Pages<'_>,
    then: Keys,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    check(queries, pages, scratch);
    check_out(queries, out);
    // SAFETY: every shape that the kernel relies on was checked above.
    dispatch_pairs!(isa, whole(
        queries: &[Query<'_>], pages: Pages<'_>, then: Keys, scratch: &mut Scratch, out: &mut [f32],
    ));
}

/// Numbers that [`attend_spans`] leaves of each span and query.
pub(crate) const fn partial_width(head_dim: usize) -> usize {
    head_dim + 2
}

/// The part of [`attend`] before the merge, for some spans: `partials` takes
/// [`partial_width`] numbers for each span and query.
///
/// # Panics
/// As [`attend`].
pub(crate) fn attend_spans(
    isa: Isa,
    queries: &[Query<'_>],
    (pages, spans): (Pages<'_>, Range<usize>),
    then: Keys,
    scratch: &mut Scratch,
    partials: &mut [f32],
) {
    check(queries, pages, scratch);
    let width = partial_width(queries[0].head_dim());
    assert!(spans.end <= longest(queries).div_ceil(SPAN));
    assert_eq!(partials.len(), spans.len() * queries.len() * width);
    // SAFETY: every shape that the kernel relies on was checked above.
    let spans = (pages, spans);
    dispatch_pairs!(isa, some(
        queries: &[Query<'_>], spans: (Pages<'_>, Range<usize>), then: Keys, scratch: &mut Scratch,
        partials: &mut [f32],
    ));
}

/// The part of [`attend`] before other spans are merged with the first ones, of which every query
/// sees all: [`partial_width`] numbers for each query at its place in `out`.
///
/// # Panics
/// As [`attend`].
pub(crate) fn attend_first(
    isa: Isa,
    queries: &[Query<'_>],
    (pages, spans): (Pages<'_>, usize),
    then: Keys,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    check(queries, pages, scratch);
    check_out(queries, out);
    assert!(queries.iter().all(|query| query.len >= spans * SPAN));
    let of = (pages, spans);
    // SAFETY: every shape that the kernel relies on was checked above.
    dispatch_pairs!(isa, begin(
        queries: &[Query<'_>], of: (Pages<'_>, usize), then: Keys, scratch: &mut Scratch,
        out: &mut [f32],
    ));
}

/// The rest of [`attend`]: merges what [`attend_first`] left of the first spans, if of any, with what
/// [`attend_spans`] left of all others.
///
/// # Panics
/// As [`attend`].
pub(crate) fn merge_spans(
    isa: Isa,
    queries: &[Query<'_>],
    (begin, spans, rest): (Option<&[f32]>, usize, &[f32]),
    out: &mut [f32],
) {
    check_out(queries, out);
    let width = queries.len() * partial_width(queries[0].head_dim());
    assert!(begin.is_none_or(|begin| begin.len() == width));
    let others = longest(queries).div_ceil(SPAN) - spans;
    assert_eq!(rest.len(), others * width);
    let partials = (begin, spans, rest);
    // SAFETY: every shape that the kernel relies on was checked above.
    dispatch!(isa, merged::<_>(
        queries: &[Query<'_>], partials: (Option<&[f32]>, usize, &[f32]), out: &mut [f32],
    ));
}
