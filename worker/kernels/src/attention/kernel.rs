//! The kernels, written once for every instruction set.
//!
//! No closure surrounds a kernel's body: it would be compiled without the features of the
//! instruction set, and its vectors passed through memory.

use std::ops::Range;

use super::merge::{Softmax, add, divide};
use super::store::{Bf16, Int8, Stored};
use super::{
    KvType, MAX_QUERIES, PAGE, Pages, Place, Query, SPAN, Scratch, longest, partial_width,
};
use crate::bf16::{Fused, Pairs};
use crate::math::exp2;
use crate::simd::{LANES, Lanes};

/// Queries whose sums fit in the registers.
const ROWS: usize = 4;
/// Vectors of scores in a page.
const TILES: usize = PAGE / LANES;

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
    // SAFETY: the contract of this function.
    unsafe { spread::<L, P>(queries, scratch) };
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
    // SAFETY: the contract of this function.
    unsafe { spread::<L, P>(queries, scratch) };
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

/// Whether queries are so few that they wait for memory. An instruction for pairs would only run
/// into what has been asked for and has not come yet, and keep the core from asking for more.
#[inline(always)]
fn few(queries: &[Query<'_>]) -> bool {
    queries.len() <= ROWS
}

/// Makes the queries' pairs ready to be multiplied with.
///
/// # Safety
/// As [`span`].
#[inline(always)]
unsafe fn spread<L: Lanes, P: Pairs<L>>(queries: &[Query<'_>], scratch: &mut Scratch) {
    // SAFETY: the contract of this function.
    unsafe {
        match few(queries) {
            true => spread_to::<L, Fused>(queries, scratch),
            false => spread_to::<L, P>(queries, scratch),
        }
    }
}

/// # Safety
/// As [`span`].
#[inline(always)]
unsafe fn spread_to<L: Lanes, P: Pairs<L>>(queries: &[Query<'_>], scratch: &mut Scratch) {
    let width = queries[0].q.len();
    for (i, query) in queries.iter().enumerate() {
        let pairs = row(&mut scratch.queries, i, width).cast::<P::By>();
        for (j, &word) in query.q.iter().enumerate() {
            // SAFETY: there is room for the pairs of every query.
            unsafe { pairs.add(j).write(P::by(word)) };
        }
    }
}

/// [`span`] with the pairs that suit the number of queries; both give the same bits.
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
        match (pages.kv, few(queries)) {
            (KvType::Bf16, false) => span::<L, P, Bf16>(queries, pages, index, scratch),
            (KvType::Bf16, true) => span::<L, Fused, Bf16>(queries, pages, index, scratch),
            (KvType::Int8, false) => span::<L, P, Int8>(queries, pages, index, scratch),
            (KvType::Int8, true) => span::<L, Fused, Int8>(queries, pages, index, scratch),
        }
    }
}

/// Attends to one span with the queries that were [spread]; the weighted sums are in
/// `scratch.span`. Queries that do not reach the
/// span have no weights, and sums of no meaning.
///
/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
unsafe fn span<L: Lanes, P: Pairs<L>, S: Stored>(
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
            let lens = &lens[i..];
            let (q, s) = (
                row(&mut scratch.queries, i, hd / 2).cast_const(),
                row(&mut scratch.scores, i, SPAN),
            );
            match n - i {
                1 => scores::<L, P, S, 1>(q, &pages, lens, hd, s),
                2 => scores::<L, P, S, 2>(q, &pages, lens, hd, s),
                3 => scores::<L, P, S, 3>(q, &pages, lens, hd, s),
                _ => scores::<L, P, S, ROWS>(q, &pages, lens, hd, s),
            }
        }
        for i in 0..n {
            let (s, w) = (
                row(&mut scratch.scores, i, SPAN),
                row(&mut scratch.weights, i, SPAN / 2).cast(),
            );
            if lens[i] > 0 {
                (softmax.max[i], softmax.sum[i]) = weights::<L, P, S>(s, &pages, lens[i], hd, w);
            }
        }
        for i in (0..n).step_by(ROWS) {
            let lens = &lens[i..];
            let (w, o) = (
                row(&mut scratch.weights, i, SPAN / 2).cast_const(),
                row(&mut scratch.span, i, hd),
            );
            match n - i {
                1 => weighted::<L, P, S, 1>(w, (&pages, &next), lens, hd, o),
                2 => weighted::<L, P, S, 2>(w, (&pages, &next), lens, hd, o),
                3 => weighted::<L, P, S, 3>(w, (&pages, &next), lens, hd, o),
                _ => weighted::<L, P, S, ROWS>(w, (&pages, &next), lens, hd, o),
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

/// `out[r][t] = q[r] · k[t]` with what is kept of the keys, summed over the pairs of dims in
/// ascending order, for whole pages.
#[inline(always)]
unsafe fn scores<L: Lanes, P: Pairs<L>, S: Stored, const R: usize>(
    q: *const Place,
    pages: &[*const u32; SPAN / PAGE],
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let second = |keys| S::line(keys, hd / 2 * LANES);
    // SAFETY: `q` has R·hd/2 places, `out` R·SPAN numbers, and the keys are those of pages.
    unsafe {
        if P::WIDE && len > PAGE {
            let tiles = [pages[0], second(pages[0]), pages[1], second(pages[1])];
            return tiles_of::<L, P, S, R, { 2 * TILES }>(q, tiles, hd, out);
        }
        for (page, &keys) in pages[..len.div_ceil(PAGE)].iter().enumerate() {
            let tiles = [keys, second(keys)];
            tiles_of::<L, P, S, R, TILES>(q, tiles, hd, out.add(page * PAGE));
        }
    }
}

/// The products with vectors of tokens. Each line of keys asks for the line of values at its place.
#[inline(always)]
unsafe fn tiles_of<L: Lanes, P: Pairs<L>, S: Stored, const R: usize, const T: usize>(
    q: *const Place,
    tiles: [*const u32; T],
    hd: usize,
    out: *mut f32,
) {
    // SAFETY: as `scores`.
    unsafe {
        let mut acc = [[L::splat(0.0); R]; T];
        for d in 0..hd / 2 {
            for (acc, tile) in acc.iter_mut().zip(tiles) {
                let line = S::line(tile, d * LANES);
                L::prefetch(line.wrapping_add(S::TYPE.half_words(hd)).cast());
                let words = S::load::<L, P>(line);
                for r in 0..R {
                    acc[r] = P::dot(acc[r], words, q.add(r * (hd / 2)).cast::<P::By>().add(d));
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

/// Turns the first `len` products of a span into scores and these into weights 2^(s - max), the
/// others into zeros; what is kept of the values is weighted with the pairs in `out`. Returns the
/// maximum and the sum of the weights.
#[inline(always)]
unsafe fn weights<L: Lanes, P: Pairs<L>, S: Stored>(
    products: *const f32,
    pages: &[*const u32; SPAN / PAGE],
    len: usize,
    hd: usize,
    out: *mut P::By,
) -> (f32, f32) {
    // SAFETY: `products` has SPAN elements, `out` a place for every two, and the pages are whole.
    unsafe {
        let mut s = [L::splat(0.0); SPAN / LANES];
        for (j, s) in s.iter_mut().enumerate() {
            let (keys, n) = (pages[j / TILES], len.saturating_sub(j * LANES));
            let products = L::load(products.add(j * LANES));
            *s = match S::scales::<L>(keys, hd, j % TILES * LANES, n) {
                Some(scales) => products.mul(scales).first(n),
                None => products.first(n),
            };
        }
        let max = s[0].max(s[1]).max(s[2].max(s[3])).maximum();
        let base = L::splat(max);
        for (j, s) in s.iter_mut().enumerate() {
            let values = pages[j / TILES].add(S::TYPE.half_words(hd));
            let n = len.saturating_sub(j * LANES);
            *s = exp2(s.sub(base));
            let by = match S::scales::<L>(values, hd, j % TILES * LANES, n) {
                Some(scales) => s.mul(scales),
                None => *s,
            };
            P::put(by, out.add(j * LANES / 2));
        }
        let sum = s[0].add(s[1]).add(s[2].add(s[3])).sum();
        (max, sum)
    }
}

/// `out[r] = Σ w[r][t] v[t]` with what is kept of the values, over the pairs of tokens in ascending order. Tokens beyond a row's
/// own length have weight zero and leave its sum as it is. Each line of values asks for the line
/// of the next span's keys at its place.
#[inline(always)]
unsafe fn weighted<L: Lanes, P: Pairs<L>, S: Stored, const R: usize>(
    w: *const Place,
    pages: (&[*const u32; SPAN / PAGE], &[*const u32; SPAN / PAGE]),
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let mut d = 0;
    // SAFETY: `w` has R·SPAN/2 places, `out` R·hd elements, and the pages are whole.
    unsafe {
        while d + 4 * LANES <= hd {
            weighted_part::<L, P, S, R, 4>(w, pages, len, hd, d, out);
            d += 4 * LANES;
        }
        while d < hd {
            weighted_part::<L, P, S, R, 1>(w, pages, len, hd, d, out);
            d += LANES;
        }
    }
}

#[inline(always)]
unsafe fn weighted_part<L: Lanes, P: Pairs<L>, S: Stored, const R: usize, const C: usize>(
    w: *const Place,
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
            let values = pages[page].add(S::TYPE.half_words(hd));
            for c in 0..C {
                let at = inner * hd + d + c * LANES;
                L::prefetch(S::line(next[page], at).cast());
                let words = S::load::<L, P>(S::line(values, at));
                for r in 0..R {
                    let by = w.add(r * (SPAN / 2)).cast::<P::By>().add(pair);
                    acc[r][c] = P::dot(acc[r][c], words, by);
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
