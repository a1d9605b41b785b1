//! The kernels, written once for every instruction set.
//!
//! No closure surrounds a kernel's body: it would be compiled without the features of the
//! instruction set, and its vectors passed through memory.

use std::ops::Range;

use super::{MAX_QUERIES, PAGE, Pages, Query, SPAN, Scratch, longest, partial_width};
use crate::bf16::{Fused, Pairs};
use crate::math::exp2;
use crate::simd::{LANES, Lanes};

/// Queries whose sums fit in the registers.
const ROWS: usize = 4;
/// Vectors of scores in a page.
const TILES: usize = PAGE / LANES;

/// For every query the greatest score and the sum of the weights.
#[derive(Clone, Copy)]
struct Softmax {
    max: [f32; MAX_QUERIES],
    sum: [f32; MAX_QUERIES],
}

impl Softmax {
    const NOTHING: Self = Self {
        max: [f32::NEG_INFINITY; MAX_QUERIES],
        sum: [0.0; MAX_QUERIES],
    };

    /// Takes in a span; what the outputs so far, and that of the span, are to be multiplied with.
    ///
    /// # Safety
    /// See [`Lanes`].
    #[inline(always)]
    unsafe fn merge<L: Lanes>(&mut self, span: &Self, n: usize) -> [[f32; MAX_QUERIES]; 2] {
        let mut factors = [[0.0; MAX_QUERIES]; 2];
        for i in (0..n).step_by(LANES) {
            // SAFETY: whole vectors of the arrays.
            unsafe {
                let load = |x: &[f32; MAX_QUERIES]| L::load(x.as_ptr().add(i));
                let (max, span_max) = (load(&self.max), load(&span.max));
                let top = max.max(span_max);
                let (old, new) = (exp2(max.sub(top)), exp2(span_max.sub(top)));
                let sum = load(&span.sum).fma(new, load(&self.sum).mul(old));
                top.store(self.max.as_mut_ptr().add(i));
                sum.store(self.sum.as_mut_ptr().add(i));
                old.store(factors[0].as_mut_ptr().add(i));
                new.store(factors[1].as_mut_ptr().add(i));
            }
        }
        factors
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
pub(super) unsafe fn whole<L: Lanes, P: Pairs<L>>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let (n, hd) = (queries.len(), queries[0].head_dim());
    let mut running = Softmax::NOTHING;
    for query in queries {
        out[query.out..query.out + hd].fill(0.0);
    }
    for index in 0..longest(queries).div_ceil(SPAN) {
        // SAFETY: the contract of this function.
        unsafe {
            let softmax = any_span::<L, P>(queries, pages, index, scratch);
            let [old, new] = running.merge::<L>(&softmax, n);
            for (i, query) in queries.iter().enumerate() {
                if query.len > index * SPAN {
                    let (o, total) = (row(&mut scratch.span, i, hd), out[query.out..].as_mut_ptr());
                    add::<L>(total, old[i], o, new[i], hd);
                }
            }
        }
    }
    for (query, sum) in queries.iter().zip(running.sum) {
        // SAFETY: the contract of this function.
        unsafe { divide::<L>(&mut out[query.out..query.out + hd], sum) };
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`attend_spans`] checks them.
#[inline(always)]
pub(super) unsafe fn some<L: Lanes, P: Pairs<L>>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    spans: Range<usize>,
    scratch: &mut Scratch,
    partials: &mut [f32],
) {
    let hd = queries[0].head_dim();
    let mut partials = partials.chunks_exact_mut(partial_width(hd));
    for index in spans {
        // SAFETY: the contract of this function.
        let Softmax { max, sum } = unsafe { any_span::<L, P>(queries, pages, index, scratch) };
        let rows = scratch.span.chunks_exact(hd).zip(max.iter().zip(&sum));
        for ((o, (&max, &sum)), partial) in rows.zip(partials.by_ref().take(queries.len())) {
            partial[..hd].copy_from_slice(o);
            (partial[hd], partial[hd + 1]) = (max, sum);
        }
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`merge_spans`] checks them.
#[inline(always)]
pub(super) unsafe fn merged<L: Lanes>(queries: &[Query<'_>], partials: &[f32], out: &mut [f32]) {
    let (n, hd) = (queries.len(), queries[0].head_dim());
    let width = partial_width(hd);
    let mut running = Softmax::NOTHING;
    for query in queries {
        out[query.out..query.out + hd].fill(0.0);
    }
    for (index, partials) in partials.chunks_exact(n * width).enumerate() {
        let mut softmax = Softmax::NOTHING;
        for (i, partial) in partials.chunks_exact(width).enumerate() {
            (softmax.max[i], softmax.sum[i]) = (partial[hd], partial[hd + 1]);
        }
        // SAFETY: the contract of this function.
        unsafe {
            let [old, new] = running.merge::<L>(&softmax, n);
            for (i, query) in queries.iter().enumerate() {
                if query.len > index * SPAN {
                    let (o, total) = (&partials[i * width..], out[query.out..].as_mut_ptr());
                    add::<L>(total, old[i], o.as_ptr(), new[i], hd);
                }
            }
        }
    }
    for (query, sum) in queries.iter().zip(running.sum) {
        // SAFETY: as above.
        unsafe { divide::<L>(&mut out[query.out..query.out + hd], sum) };
    }
}

/// `total = total * old + span * new`.
///
/// # Safety
/// See [`Lanes`]; both stand for `hd` elements, whole lanes.
#[inline(always)]
unsafe fn add<L: Lanes>(total: *mut f32, old: f32, span: *const f32, new: f32, hd: usize) {
    // SAFETY: the contract of this function.
    unsafe {
        let (old, new) = (L::splat(old), L::splat(new));
        for d in (0..hd).step_by(LANES) {
            let merged = L::load(span.add(d)).fma(new, L::load(total.add(d)).mul(old));
            merged.store(total.add(d));
        }
    }
}

/// # Safety
/// See [`Lanes`]; whole lanes.
#[inline(always)]
unsafe fn divide<L: Lanes>(out: &mut [f32], sum: f32) {
    // SAFETY: the contract of this function.
    unsafe {
        let scale = L::splat(1.0 / sum);
        for lanes in out.chunks_exact_mut(LANES) {
            L::load(lanes.as_ptr()).mul(scale).store(lanes.as_mut_ptr());
        }
    }
}

/// [`span`] with the pairs that suit the number of queries; both give the same bits. Few queries
/// wait for memory: the instruction would only run into what has been asked for and has not come
/// yet, and keep the core from asking for more.
///
/// # Safety
/// As [`span`].
#[inline(always)]
unsafe fn any_span<L: Lanes, P: Pairs<L>>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    index: usize,
    scratch: &mut Scratch,
) -> Softmax {
    // SAFETY: the contract of this function.
    unsafe {
        if queries.len() > ROWS {
            span::<L, P>(queries, pages, index, scratch)
        } else {
            span::<L, Fused>(queries, pages, index, scratch)
        }
    }
}

/// Attends to one span; the weighted sums are in `scratch.span`. Queries that do not reach the
/// span have no weights, and sums of no meaning.
///
/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
unsafe fn span<L: Lanes, P: Pairs<L>>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    index: usize,
    scratch: &mut Scratch,
) -> Softmax {
    let (n, hd, start) = (queries.len(), queries[0].head_dim(), index * SPAN);
    let last = longest(queries).div_ceil(PAGE);
    let page = |i: usize| pages.page((start / PAGE + i).min(last - 1), hd);
    let pages: [*const u32; SPAN / PAGE] = std::array::from_fn(page);
    let next: [*const u32; SPAN / PAGE] = std::array::from_fn(|i| page(SPAN / PAGE + i));
    let mut lens = [0usize; MAX_QUERIES];
    for (len, query) in lens.iter_mut().zip(queries) {
        *len = query.len.saturating_sub(start).min(SPAN);
    }
    let mut softmax = Softmax::NOTHING;
    // SAFETY: the contract of this function; rows i..i+r are within `n`.
    unsafe {
        for i in (0..n).step_by(ROWS) {
            let (queries, lens) = (&queries[i..], &lens[i..]);
            let s = row(&mut scratch.scores, i, SPAN);
            match n - i {
                1 => scores::<L, P, 1>(queries, &pages, lens, hd, s),
                2 => scores::<L, P, 2>(queries, &pages, lens, hd, s),
                3 => scores::<L, P, 3>(queries, &pages, lens, hd, s),
                _ => scores::<L, P, ROWS>(queries, &pages, lens, hd, s),
            }
        }
        for i in 0..n {
            let (s, w) = (
                row(&mut scratch.scores, i, SPAN),
                row(&mut scratch.weights, i, SPAN / 2),
            );
            if lens[i] > 0 {
                (softmax.max[i], softmax.sum[i]) = weights::<L>(s, lens[i], w);
            }
        }
        for i in (0..n).step_by(ROWS) {
            let lens = &lens[i..];
            let (w, o) = (
                row(&mut scratch.weights, i, SPAN / 2),
                row(&mut scratch.span, i, hd),
            );
            match n - i {
                1 => weighted::<L, P, 1>(w, (&pages, &next), lens, hd, o),
                2 => weighted::<L, P, 2>(w, (&pages, &next), lens, hd, o),
                3 => weighted::<L, P, 3>(w, (&pages, &next), lens, hd, o),
                _ => weighted::<L, P, ROWS>(w, (&pages, &next), lens, hd, o),
            }
        }
    }
    softmax
}

/// Row `i` of a matrix of `width` columns.
#[inline(always)]
fn row<T>(matrix: &mut [T], i: usize, width: usize) -> *mut T {
    matrix[i * width..].as_mut_ptr()
}

/// `out[r][t] = q[r] · k[t]`, summed over the pairs of dims in ascending order, for whole pages.
#[inline(always)]
unsafe fn scores<L: Lanes, P: Pairs<L>, const R: usize>(
    queries: &[Query<'_>],
    pages: &[*const u32; SPAN / PAGE],
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let mut q = [std::ptr::null(); R];
    for (q, query) in q.iter_mut().zip(queries) {
        *q = query.q.as_ptr();
    }
    let tile = hd / 2 * LANES;
    // SAFETY: `queries[r].q` has `hd / 2` words, a page `PAGE * hd`, `out` R·SPAN.
    unsafe {
        if P::WIDE && len > PAGE {
            let tiles = [pages[0], pages[0].add(tile), pages[1], pages[1].add(tile)];
            return tiles_of::<L, P, R, { 2 * TILES }>(q, tiles, hd, out);
        }
        for (page, &keys) in pages[..len.div_ceil(PAGE)].iter().enumerate() {
            let tiles = [keys, keys.add(tile)];
            tiles_of::<L, P, R, TILES>(q, tiles, hd, out.add(page * PAGE));
        }
    }
}

/// The scores of vectors of tokens. Each line of keys asks for the line of values at its place.
#[inline(always)]
unsafe fn tiles_of<L: Lanes, P: Pairs<L>, const R: usize, const T: usize>(
    q: [*const u32; R],
    tiles: [*const u32; T],
    hd: usize,
    out: *mut f32,
) {
    // SAFETY: as `scores`.
    unsafe {
        let mut acc = [[L::splat(0.0); R]; T];
        for d in 0..hd / 2 {
            for (acc, tile) in acc.iter_mut().zip(tiles) {
                let line = tile.add(d * LANES);
                L::prefetch(line.wrapping_add(PAGE * hd / 2).cast());
                let words = P::load(line);
                for r in 0..R {
                    acc[r] = P::dot(acc[r], words, *q[r].add(d));
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for r in 0..R {
                acc[r].store(out.add(r * SPAN + t * LANES));
            }
        }
    }
}

/// Turns the first `len` scores of a span into weights 2^(s - max), the others into zeros, as
/// pairs. Returns the maximum and the sum of the weights.
#[inline(always)]
unsafe fn weights<L: Lanes>(scores: *const f32, len: usize, out: *mut u32) -> (f32, f32) {
    // SAFETY: `scores` has SPAN elements, `out` a word for every two.
    unsafe {
        let mut s = [L::splat(0.0); SPAN / LANES];
        for (j, s) in s.iter_mut().enumerate() {
            *s = L::load(scores.add(j * LANES)).first(len.saturating_sub(j * LANES));
        }
        let max = s[0].max(s[1]).max(s[2].max(s[3])).maximum();
        let base = L::splat(max);
        for (j, s) in s.iter_mut().enumerate() {
            *s = exp2(s.sub(base));
            s.store_bf16(out.cast::<u16>().add(j * LANES));
        }
        let sum = s[0].add(s[1]).add(s[2].add(s[3])).sum();
        (max, sum)
    }
}

/// `out[r] = Σ w[r][t] v[t]` over the pairs of tokens in ascending order. Tokens beyond a row's
/// own length have weight zero and leave its sum as it is. Each line of values asks for the line
/// of the next span's keys at its place.
#[inline(always)]
unsafe fn weighted<L: Lanes, P: Pairs<L>, const R: usize>(
    w: *const u32,
    pages: (&[*const u32; SPAN / PAGE], &[*const u32; SPAN / PAGE]),
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let mut d = 0;
    // SAFETY: a page has `PAGE * hd` words, `w` R·SPAN/2 and `out` R·hd elements.
    unsafe {
        while d + 4 * LANES <= hd {
            weighted_part::<L, P, R, 4>(w, pages, len, hd, d, out);
            d += 4 * LANES;
        }
        while d < hd {
            weighted_part::<L, P, R, 1>(w, pages, len, hd, d, out);
            d += LANES;
        }
    }
}

#[inline(always)]
unsafe fn weighted_part<L: Lanes, P: Pairs<L>, const R: usize, const C: usize>(
    w: *const u32,
    (pages, next): (&[*const u32; SPAN / PAGE], &[*const u32; SPAN / PAGE]),
    len: usize,
    hd: usize,
    d: usize,
    out: *mut f32,
) {
    // SAFETY: as `weighted`.
    unsafe {
        let mut acc = [[L::splat(0.0); C]; R];
        for pair in 0..len.div_ceil(2) {
            let (page, inner) = (pair / (PAGE / 2), pair % (PAGE / 2));
            let values = pages[page].add(PAGE / 2 * hd + inner * hd + d);
            let later = next[page].add(inner * hd + d);
            for c in 0..C {
                L::prefetch(later.add(c * LANES).cast());
                let words = P::load(values.add(c * LANES));
                for r in 0..R {
                    acc[r][c] = P::dot(acc[r][c], words, *w.add(r * (SPAN / 2) + pair));
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                acc[r][c].store(out.add(r * hd + d + c * LANES));
            }
        }
    }
}
