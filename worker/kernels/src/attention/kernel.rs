//! The kernels, written once for every instruction set.
//!
//! No closure surrounds a kernel's body: it would be compiled without the features of the
//! instruction set, and its vectors passed through memory.

use std::ops::Range;

use super::{MAX_QUERIES, PAGE, Pages, Query, SPAN, Scratch, longest, partial_width};
use crate::math::exp;
use crate::simd::{LANES, Lanes};

/// The greatest score and the sum of the weights so far.
type Softmax = (f32, f32);

/// Queries whose sums fit in the registers.
const ROWS: usize = 4;

const NOTHING: Softmax = (f32::NEG_INFINITY, 0.0);

/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
pub(super) unsafe fn whole<L: Lanes>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let hd = queries[0].q.len();
    let mut running = [NOTHING; MAX_QUERIES];
    for query in queries {
        out[query.out..query.out + hd].fill(0.0);
    }
    for index in 0..longest(queries).div_ceil(SPAN) {
        // SAFETY: the contract of this function.
        unsafe {
            let spans = span::<L>(queries, pages, index, scratch);
            for (i, query) in queries.iter().enumerate() {
                if query.len > index * SPAN {
                    let (o, total) = (row(&mut scratch.span, i, hd), out[query.out..].as_mut_ptr());
                    running[i] = merge::<L>(running[i], spans[i], o, total, hd);
                }
            }
        }
    }
    for (query, (_, sum)) in queries.iter().zip(running) {
        // SAFETY: the contract of this function.
        unsafe { divide::<L>(&mut out[query.out..query.out + hd], sum) };
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`attend_spans`] checks them.
#[inline(always)]
pub(super) unsafe fn some<L: Lanes>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    spans: Range<usize>,
    scratch: &mut Scratch,
    partials: &mut [f32],
) {
    let hd = queries[0].q.len();
    let mut partials = partials.chunks_exact_mut(partial_width(hd));
    for index in spans {
        // SAFETY: the contract of this function.
        let softmax = unsafe { span::<L>(queries, pages, index, scratch) };
        let rows = scratch.span.chunks_exact(hd).zip(softmax);
        for ((o, (max, sum)), partial) in rows.zip(partials.by_ref().take(queries.len())) {
            partial[..hd].copy_from_slice(o);
            (partial[hd], partial[hd + 1]) = (max, sum);
        }
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`merge_spans`] checks them.
#[inline(always)]
pub(super) unsafe fn merged<L: Lanes>(queries: &[Query<'_>], partials: &[f32], out: &mut [f32]) {
    let hd = queries[0].q.len();
    let width = partial_width(hd);
    for (i, query) in queries.iter().enumerate() {
        let out = &mut out[query.out..query.out + hd];
        out.fill(0.0);
        let mut running = NOTHING;
        for index in 0..query.len.div_ceil(SPAN) {
            let partial = &partials[(index * queries.len() + i) * width..][..width];
            let softmax = (partial[hd], partial[hd + 1]);
            // SAFETY: the contract of this function.
            unsafe {
                running = merge::<L>(running, softmax, partial.as_ptr(), out.as_mut_ptr(), hd);
            }
        }
        // SAFETY: as above.
        unsafe { divide::<L>(out, running.1) };
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

/// Attends to one span; the weighted sums are in `scratch.span`. What it says of queries that
/// do not reach the span is of no meaning.
///
/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
unsafe fn span<L: Lanes>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    index: usize,
    scratch: &mut Scratch,
) -> [Softmax; MAX_QUERIES] {
    let (n, hd, start) = (queries.len(), queries[0].q.len(), index * SPAN);
    let last = longest(queries).div_ceil(PAGE);
    let page = |i: usize| pages.page((start / PAGE + i).min(last - 1), hd);
    let pages: [*const u32; SPAN / PAGE] = std::array::from_fn(page);
    let next: [*const u32; SPAN / PAGE] = std::array::from_fn(|i| page(SPAN / PAGE + i));
    let mut lens = [0usize; MAX_QUERIES];
    for (len, query) in lens.iter_mut().zip(queries) {
        *len = query.len.saturating_sub(start).min(SPAN);
    }
    let mut spans = [NOTHING; MAX_QUERIES];
    // SAFETY: the contract of this function; rows i..i+r are within `n`.
    unsafe {
        for i in (0..n).step_by(ROWS) {
            let (queries, lens) = (&queries[i..], &lens[i..]);
            let s = row(&mut scratch.scores, i, SPAN);
            match n - i {
                1 => scores::<L, 1>(queries, &pages, lens, hd, s),
                2 => scores::<L, 2>(queries, &pages, lens, hd, s),
                3 => scores::<L, 3>(queries, &pages, lens, hd, s),
                _ => scores::<L, ROWS>(queries, &pages, lens, hd, s),
            }
        }
        for i in 0..n {
            if lens[i] > 0 {
                spans[i] = softmax::<L>(row(&mut scratch.scores, i, SPAN), lens[i]);
            }
        }
        for i in (0..n).step_by(ROWS) {
            let lens = &lens[i..];
            let (p, o) = (
                row(&mut scratch.scores, i, SPAN),
                row(&mut scratch.span, i, hd),
            );
            match n - i {
                1 => weighted::<L, 1>(p, (&pages, &next), lens, hd, o),
                2 => weighted::<L, 2>(p, (&pages, &next), lens, hd, o),
                3 => weighted::<L, 3>(p, (&pages, &next), lens, hd, o),
                _ => weighted::<L, ROWS>(p, (&pages, &next), lens, hd, o),
            }
        }
    }
    spans
}

/// Row `i` of a matrix of `width` columns.
#[inline(always)]
fn row(matrix: &mut [f32], i: usize, width: usize) -> *mut f32 {
    matrix[i * width..].as_mut_ptr()
}

/// `out[r][t] = q[r] · k[t]`, summed over the dims in ascending order, for whole pages. Each
/// line of keys asks for the line of values at its place.
#[inline(always)]
unsafe fn scores<L: Lanes, const R: usize>(
    queries: &[Query<'_>],
    pages: &[*const u32; SPAN / PAGE],
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    const TILES: usize = PAGE / LANES;
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let mut q = [std::ptr::null(); R];
    for (q, query) in q.iter_mut().zip(queries) {
        *q = query.q.as_ptr();
    }
    let tile = hd / 2 * LANES;
    // SAFETY: `queries[r].q` has `hd` elements, a page `PAGE * hd` words, `out` R·SPAN.
    unsafe {
        for (page, &keys) in pages[..len.div_ceil(PAGE)].iter().enumerate() {
            let mut acc = [[L::splat(0.0); R]; TILES];
            for d in 0..hd / 2 {
                for (t, acc) in acc.iter_mut().enumerate() {
                    let line = keys.add(t * tile + d * LANES);
                    L::prefetch(line.add(TILES * tile).cast());
                    let (even, odd) = L::bf16_pairs(line);
                    for r in 0..R {
                        acc[r] = even.fma(L::splat(*q[r].add(2 * d)), acc[r]);
                    }
                    for r in 0..R {
                        acc[r] = odd.fma(L::splat(*q[r].add(2 * d + 1)), acc[r]);
                    }
                }
            }
            for (t, acc) in acc.iter().enumerate() {
                for r in 0..R {
                    acc[r].store(out.add(r * SPAN + page * PAGE + t * LANES));
                }
            }
        }
    }
}

/// Turns the first `len` scores of a span into weights exp(s - max), the others into zeros.
/// Returns the maximum and the sum of the weights.
#[inline(always)]
unsafe fn softmax<L: Lanes>(scores: *mut f32, len: usize) -> Softmax {
    // SAFETY: `scores` has SPAN elements.
    unsafe {
        let mut s = [L::splat(0.0); SPAN / LANES];
        for (j, s) in s.iter_mut().enumerate() {
            *s = L::load(scores.add(j * LANES)).first(len.saturating_sub(j * LANES));
        }
        let max = s[0].max(s[1]).max(s[2].max(s[3])).maximum();
        let base = L::splat(max);
        for (j, s) in s.iter_mut().enumerate() {
            *s = exp(s.sub(base));
            s.store(scores.add(j * LANES));
        }
        let sum = s[0].add(s[1]).add(s[2].add(s[3])).sum();
        (max, sum)
    }
}

/// `out[r] = Σ p[r][t] v[t]` over the tokens in ascending order. Tokens beyond a row's own
/// length have weight zero and leave its sum as it is. Each line of values asks for the line of
/// the next span's keys at its place.
#[inline(always)]
unsafe fn weighted<L: Lanes, const R: usize>(
    p: *const f32,
    pages: (&[*const u32; SPAN / PAGE], &[*const u32; SPAN / PAGE]),
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let mut d = 0;
    // SAFETY: a page has `PAGE * hd` words, `p` R·SPAN elements and `out` R·hd.
    unsafe {
        while d + 4 * LANES <= hd {
            weighted_part::<L, R, 4>(p, pages, len, hd, d, out);
            d += 4 * LANES;
        }
        while d < hd {
            weighted_part::<L, R, 1>(p, pages, len, hd, d, out);
            d += LANES;
        }
    }
}

#[inline(always)]
unsafe fn weighted_part<L: Lanes, const R: usize, const C: usize>(
    p: *const f32,
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
                let (first, second) = L::bf16_pairs(values.add(c * LANES));
                for r in 0..R {
                    let weight = p.add(r * SPAN + 2 * pair);
                    acc[r][c] = first.fma(L::splat(*weight), acc[r][c]);
                    acc[r][c] = second.fma(L::splat(*weight.add(1)), acc[r][c]);
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

/// Merges a span's (maximum, sum, output) into the running ones.
#[inline(always)]
unsafe fn merge<L: Lanes>(
    (max, sum): Softmax,
    (span_max, span_sum): Softmax,
    span: *const f32,
    total: *mut f32,
    hd: usize,
) -> Softmax {
    // SAFETY: both stand for `hd` elements.
    unsafe {
        let top = if span_max > max { span_max } else { max };
        let mut scales = [0.0f32; LANES];
        scales[0] = max - top;
        scales[1] = span_max - top;
        exp(L::load(scales.as_ptr())).store(scales.as_mut_ptr());
        let (old, new) = (L::splat(scales[0]), L::splat(scales[1]));
        for d in (0..hd).step_by(LANES) {
            let merged = L::load(span.add(d)).fma(new, L::load(total.add(d)).mul(old));
            merged.store(total.add(d));
        }
        (top, span_sum.mul_add(scales[1], sum * scales[0]))
    }
}
