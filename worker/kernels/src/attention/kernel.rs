//! The kernels, written once for every instruction set.
//!
//! No closure surrounds a kernel's body: it would be compiled without the features of the
//! instruction set, and its vectors passed through memory.

use std::ops::Range;

use super::kept::{Bf16, Int8, Int16, Kept};
use super::merge::{Softmax, add, divide};
use super::weights::weights;
use super::{
    Keys, KvType, MAX_QUERIES, PAGE, Pages, Place, Query, SPAN, Scratch, longest, partial_width,
};
use crate::bf16::{Fused, Pairs};
use crate::int16;
use crate::simd::{LANES, Lanes};

/// Queries whose sums fit in the registers.
const ROWS: usize = 4;
/// Vectors of scores in a page.
pub(super) const TILES: usize = PAGE / LANES;

/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
pub(super) unsafe fn whole<L: int16::Int16, P: Pairs<L>>(
    queries: &[Query<'_>],
    pages: Pages<'_>,
    then: Keys,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let hd = queries[0].head_dim();
    let spans = longest(queries).div_ceil(SPAN);
    // SAFETY: the contract of this function.
    unsafe {
        let softmax = first::<L, P>(queries, (pages, spans), then, scratch, out);
        for (query, sum) in queries.iter().zip(softmax.sum) {
            divide::<L>(&mut out[query.out..query.out + hd], sum);
        }
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`attend_first`](super::attend_first) checks them.
#[inline(always)]
pub(super) unsafe fn begin<L: int16::Int16, P: Pairs<L>>(
    queries: &[Query<'_>],
    of: (Pages<'_>, usize),
    then: Keys,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let hd = queries[0].head_dim();
    // SAFETY: the contract of this function.
    let Softmax { max, sum } = unsafe { first::<L, P>(queries, of, then, scratch, out) };
    for (query, softmax) in queries.iter().zip(max.into_iter().zip(sum)) {
        (out[query.out + hd], out[query.out + hd + 1]) = softmax;
    }
}

/// Attends to the first spans; the weighted sums are in `out`.
///
/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
unsafe fn first<L: int16::Int16, P: Pairs<L>>(
    queries: &[Query<'_>],
    (pages, spans): (Pages<'_>, usize),
    then: Keys,
    scratch: &mut Scratch,
    out: &mut [f32],
) -> Softmax {
    let (n, hd) = (queries.len(), queries[0].head_dim());
    let mut running = Softmax::after(None, queries, out);
    // SAFETY: the contract of this function.
    unsafe { spread::<L, P>(queries, pages.shape.kv, scratch) };
    let spans = 0..spans;
    for index in spans.clone() {
        // SAFETY: the contract of this function.
        unsafe {
            let of_span = (pages, index, pages.after(index, &spans, then));
            let softmax = any_span::<L, P>(queries, of_span, scratch);
            let [old, new] = running.merge::<L>(&softmax, n);
            for (i, query) in queries.iter().enumerate() {
                if query.len > index * SPAN {
                    let (o, total) = (row(&mut scratch.span, i, hd), out[query.out..].as_mut_ptr());
                    add::<L>(total, old[i], o, new[i], hd);
                }
            }
        }
    }
    running
}

/// # Safety
/// See [`Lanes`]; shapes as [`attend_spans`] checks them.
#[inline(always)]
pub(super) unsafe fn some<L: int16::Int16, P: Pairs<L>>(
    queries: &[Query<'_>],
    (pages, spans): (Pages<'_>, Range<usize>),
    then: Keys,
    scratch: &mut Scratch,
    partials: &mut [f32],
) {
    let hd = queries[0].head_dim();
    let mut partials = partials.chunks_exact_mut(partial_width(hd));
    // SAFETY: the contract of this function.
    unsafe { spread::<L, P>(queries, pages.shape.kv, scratch) };
    for index in spans.clone() {
        let of_span = (pages, index, pages.after(index, &spans, then));
        // SAFETY: the contract of this function.
        let Softmax { max, sum } = unsafe { any_span::<L, P>(queries, of_span, scratch) };
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
unsafe fn spread<L: int16::Int16, P: Pairs<L>>(
    queries: &[Query<'_>],
    kv: KvType,
    scratch: &mut Scratch,
) {
    // SAFETY: the contract of this function.
    unsafe {
        match (kv, few(queries)) {
            (KvType::Bf16, false) => spread_to::<L, Bf16<P>>(queries, scratch),
            (KvType::Bf16, true) => spread_to::<L, Bf16<Fused>>(queries, scratch),
            (KvType::Int16 | KvType::Int8, _) => spread_to::<L, Int16>(queries, scratch),
        }
    }
}

/// # Safety
/// As [`span`].
#[inline(always)]
unsafe fn spread_to<L: Lanes, K: Kept<L>>(queries: &[Query<'_>], scratch: &mut Scratch) {
    let width = queries[0].q.len();
    for (i, query) in queries.iter().enumerate() {
        let pairs = row(places(&mut scratch.queries), i, width).cast::<K::By>();
        for (j, &word) in query.q.iter().enumerate() {
            // SAFETY: there is room for the pairs of every query.
            unsafe { pairs.add(j).write(K::by(word)) };
        }
    }
}

/// [`span`] with the pairs that suit what is kept and the number of queries; that changes no bit.
///
/// # Safety
/// As [`span`].
#[inline(always)]
unsafe fn any_span<L: int16::Int16, P: Pairs<L>>(
    queries: &[Query<'_>],
    (pages, index, next): (Pages<'_>, usize, Keys),
    scratch: &mut Scratch,
) -> Softmax {
    let of_span = (&pages.span(index), &next, index * SPAN);
    // SAFETY: the contract of this function.
    unsafe {
        match (pages.shape.kv, few(queries)) {
            (KvType::Bf16, false) => span::<L, Bf16<P>>(queries, of_span, scratch),
            (KvType::Bf16, true) => span::<L, Bf16<Fused>>(queries, of_span, scratch),
            (KvType::Int16, _) => span::<L, Int16>(queries, of_span, scratch),
            (KvType::Int8, _) => span::<L, Int8>(queries, of_span, scratch),
        }
    }
}

/// Attends to one span with the queries that were [spread], while memory is asked for the `next`;
/// the weighted sums are in `scratch.span`. Queries that do not reach the span have no weights,
/// and sums of no meaning.
///
/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
unsafe fn span<L: Lanes, K: Kept<L>>(
    queries: &[Query<'_>],
    (pages, next, start): (&Keys, &Keys, usize),
    scratch: &mut Scratch,
) -> Softmax {
    let (n, hd) = (queries.len(), queries[0].head_dim());
    let mut lens = [0usize; MAX_QUERIES];
    for (len, query) in lens.iter_mut().zip(queries) {
        *len = query.len.saturating_sub(start).min(SPAN);
    }
    for (page, next) in pages.iter().zip(next) {
        // The scales of these values and of the next keys.
        for line in (0..PAGE).step_by(LANES) {
            let scales = |half: *const u32| half.wrapping_add(K::TYPE.scales_at(hd) + line);
            L::prefetch(scales(page.wrapping_add(K::TYPE.half_words(hd))).cast());
            L::prefetch(scales(*next).cast());
        }
    }
    let mut softmax = Softmax::NOTHING;
    // What the sums of a query's weighted values are to be multiplied with.
    let mut factors = [0.0; MAX_QUERIES];
    // SAFETY: the contract of this function; rows i..i+r are within `n`.
    unsafe {
        for i in (0..n).step_by(ROWS) {
            let lens = &lens[i..];
            let (q, s) = (
                row(places(&mut scratch.queries), i, hd / 2).cast_const(),
                row(&mut scratch.scores, i, SPAN),
            );
            match n - i {
                1 => scores::<L, K, 1, true>(q, pages, lens, hd, s),
                2 => scores::<L, K, 2, true>(q, pages, lens, hd, s),
                3 => scores::<L, K, 3, true>(q, pages, lens, hd, s),
                _ if i == 0 => scores::<L, K, ROWS, true>(q, pages, lens, hd, s),
                _ => scores::<L, K, ROWS, false>(q, pages, lens, hd, s),
            }
        }
        for i in (0..n).step_by(ROWS) {
            let of_rows = (&queries[i..], &lens[i..]);
            let (s, w) = (
                row(&mut scratch.scores, i, SPAN).cast_const(),
                row(places(&mut scratch.weights), i, SPAN / 2),
            );
            let results = (&mut softmax, &mut factors, i);
            match n - i {
                1 => weights::<L, K, 1>(s, of_rows, pages, hd, w, results),
                2 => weights::<L, K, 2>(s, of_rows, pages, hd, w, results),
                3 => weights::<L, K, 3>(s, of_rows, pages, hd, w, results),
                _ => weights::<L, K, ROWS>(s, of_rows, pages, hd, w, results),
            }
        }
        for i in (0..n).step_by(ROWS) {
            let of_rows = (&lens[i..], &factors[i..]);
            let (w, o) = (
                row(places(&mut scratch.weights), i, SPAN / 2).cast_const(),
                row(&mut scratch.span, i, hd),
            );
            match n - i {
                1 => weighted::<L, K, 1, true>(w, (pages, next), of_rows, hd, o),
                2 => weighted::<L, K, 2, true>(w, (pages, next), of_rows, hd, o),
                3 => weighted::<L, K, 3, true>(w, (pages, next), of_rows, hd, o),
                _ if i == 0 => weighted::<L, K, ROWS, true>(w, (pages, next), of_rows, hd, o),
                _ => weighted::<L, K, ROWS, false>(w, (pages, next), of_rows, hd, o),
            }
        }
    }
    softmax
}

/// Room for pairs.
#[inline(always)]
fn places(lines: &mut [f32]) -> &mut [Place] {
    lines.as_chunks_mut().0
}

/// Row `i` of a matrix of `width` columns.
#[inline(always)]
fn row<T>(matrix: &mut [T], i: usize, width: usize) -> *mut T {
    matrix[i * width..].as_mut_ptr()
}

/// `out[r][t] = q[r] · k[t]` with what is kept of the keys, summed over the pairs of dims in
/// ascending order, for whole pages.
#[inline(always)]
unsafe fn scores<L: Lanes, K: Kept<L>, const R: usize, const ASK: bool>(
    q: *const Place,
    pages: &Keys,
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let second = |keys| K::line(keys, hd / 2 * LANES);
    // SAFETY: `q` has R·hd/2 places, `out` R·SPAN numbers, and the keys are those of pages.
    unsafe {
        if K::WIDE && len > PAGE {
            let tiles = [pages[0], second(pages[0]), pages[1], second(pages[1])];
            return tiles_of::<L, K, R, { 2 * TILES }, ASK>(q, tiles, hd, out);
        }
        for (page, &keys) in pages[..len.div_ceil(PAGE)].iter().enumerate() {
            let out = out.add(page * PAGE);
            if K::WIDE {
                let tiles = [keys, second(keys)];
                tiles_of::<L, K, R, TILES, ASK>(q, tiles, hd, out);
            } else {
                tiles_of::<L, K, R, 1, ASK>(q, [keys], hd, out);
                tiles_of::<L, K, R, 1, ASK>(q, [second(keys)], hd, out.add(LANES));
            }
        }
    }
}

/// The products with vectors of tokens. If it is to `ASK`, each line of keys asks for the line of
/// values at its place: the first queries of a block do.
#[inline(always)]
unsafe fn tiles_of<L: Lanes, K: Kept<L>, const R: usize, const T: usize, const ASK: bool>(
    q: *const Place,
    tiles: [*const u32; T],
    hd: usize,
    out: *mut f32,
) {
    // SAFETY: as `scores`.
    unsafe {
        let mut acc = [[K::none(); R]; T];
        for d in 0..hd / 2 {
            for (acc, tile) in acc.iter_mut().zip(tiles) {
                let line = K::line(tile, d * LANES);
                if ASK {
                    L::prefetch(line.wrapping_add(K::TYPE.half_words(hd)).cast());
                }
                let words = K::load(line);
                for r in 0..R {
                    acc[r] = K::dot(acc[r], words, q.add(r * (hd / 2)).cast::<K::By>().add(d));
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for r in 0..R {
                K::floats(acc[r]).store(out.add(r * SPAN + t * LANES));
            }
        }
    }
}

/// `out[r] = Σ w[r][t] v[t]` with what is kept of the values, over the pairs of tokens in ascending
/// order. Tokens beyond a row's own length have weight zero and leave its sum as it is. If it is to
/// `ASK`, each line of values asks for the line of the next keys at its place.
#[inline(always)]
unsafe fn weighted<L: Lanes, K: Kept<L>, const R: usize, const ASK: bool>(
    w: *const Place,
    pages: (&Keys, &Keys),
    (lens, factors): (&[usize], &[f32]),
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let mut d = 0;
    // SAFETY: `w` has R·SPAN/2 places, `out` R·hd elements, and the pages are whole.
    unsafe {
        while K::WIDE && d + 4 * LANES <= hd {
            weighted_part::<L, K, R, 4, ASK>(w, pages, (len, factors), hd, d, out);
            d += 4 * LANES;
        }
        while d < hd {
            weighted_part::<L, K, R, 1, ASK>(w, pages, (len, factors), hd, d, out);
            d += LANES;
        }
    }
}

#[inline(always)]
unsafe fn weighted_part<L: Lanes, K: Kept<L>, const R: usize, const C: usize, const ASK: bool>(
    w: *const Place,
    (pages, next): (&Keys, &Keys),
    (len, factors): (usize, &[f32]),
    hd: usize,
    d: usize,
    out: *mut f32,
) {
    // SAFETY: as `weighted`.
    unsafe {
        let mut acc = [[K::none(); C]; R];
        for (page, (values, next)) in pages.iter().zip(next).enumerate() {
            let pairs = len.saturating_sub(page * PAGE).min(PAGE).div_ceil(2);
            let values = values.add(K::TYPE.half_words(hd));
            let at = |pair, c| pair * hd + d + c * LANES;
            for pair in 0..pairs {
                for c in 0..C {
                    let at = at(pair, c);
                    if ASK {
                        L::prefetch(K::line(*next, at).cast());
                    }
                    let words = K::load(K::line(values, at));
                    for r in 0..R {
                        let by = w.add(r * (SPAN / 2)).cast::<K::By>();
                        acc[r][c] = K::dot(acc[r][c], words, by.add(page * PAGE / 2 + pair));
                    }
                }
            }
            for pair in pairs..if ASK { PAGE / 2 } else { 0 } {
                for c in 0..C {
                    L::prefetch(K::line(*next, at(pair, c)).cast());
                }
            }
        }
        for r in 0..R {
            let factor = L::splat(factors[r]);
            for c in 0..C {
                let sums = K::floats(acc[r][c]).mul(factor);
                sums.store(out.add(r * hd + d + c * LANES));
            }
        }
    }
}
