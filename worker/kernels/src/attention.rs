//! Attention over paged keys and values.
//!
//! A page holds [`PAGE`] tokens of one key–value head as bf16, in the order that attention
//! reads it: keys as `[half of 16 tokens][pair of dims][token][2]`, so that lanes are tokens,
//! values as `[pair of tokens][dim][2]`, so that lanes are dimensions. Nothing is re-packed
//! after the append.
//!
//! A query attends span by span, [`SPAN`] tokens each: scores, their maximum, weights, the
//! weighted sum of the values; spans are merged in ascending order by log-sum-exp (Rabe and
//! Staats 2021). Every sum runs in one fixed order that depends on the query's own length
//! only, so batching, chunking and page placement change no bit.

use crate::Isa;
use crate::math::exp;
use crate::simd::{LANES, Lanes, dispatch};

/// Tokens in a page.
pub const PAGE: usize = 32;
/// Tokens whose scores share one maximum.
pub const SPAN: usize = 2 * PAGE;
/// Most queries of one [`attend`] call.
pub const MAX_QUERIES: usize = 32;

/// u32 words of one page of one head: keys, then values.
pub const fn page_words(head_dim: usize) -> usize {
    PAGE * head_dim
}

/// bf16 by round-to-nearest-even; NaN stays NaN.
#[inline]
fn bf16(x: f32) -> u32 {
    u32::from(half::bf16::from_f32(x).to_bits())
}

/// Stores the key and the value of one token at `offset` of a page.
///
/// # Panics
/// When the slices are not of the page's shape.
pub fn append(page: &mut [u32], offset: usize, key: &[f32], value: &[f32]) {
    append_key(page, offset, key);
    append_value(page, offset, value);
}

/// Stores the key alone.
///
/// # Panics
/// When the slices are not of the page's shape.
pub fn append_key(page: &mut [u32], offset: usize, key: &[f32]) {
    let hd = key.len();
    assert!(page.len() == page_words(hd) && offset < PAGE);
    let start = offset / LANES * (hd / 2 * LANES) + offset % LANES;
    for (i, pair) in key.chunks_exact(2).enumerate() {
        page[start + i * LANES] = bf16(pair[0]) | bf16(pair[1]) << 16;
    }
}

/// Stores the value alone. The first token of a pair clears its partner's place, so no value
/// of the page's previous owner is ever read.
///
/// # Panics
/// When the slices are not of the page's shape.
pub fn append_value(page: &mut [u32], offset: usize, value: &[f32]) {
    let hd = value.len();
    assert!(page.len() == page_words(hd) && offset < PAGE);
    let start = PAGE / 2 * hd + offset / 2 * hd;
    let words = &mut page[start..start + hd];
    if offset.is_multiple_of(2) {
        for (word, &v) in words.iter_mut().zip(value) {
            *word = bf16(v);
        }
    } else {
        for (word, &v) in words.iter_mut().zip(value) {
            *word = (*word & 0xffff) | bf16(v) << 16;
        }
    }
}

/// One query head of one row.
#[derive(Clone, Copy)]
pub struct Query<'a> {
    /// The rotated query, already times 1/sqrt(head_dim).
    pub q: &'a [f32],
    /// Tokens it sees: its position + 1.
    pub len: usize,
}

/// Room for the intermediate results of one [`attend`] call.
pub struct Scratch {
    scores: Vec<f32>,
    span: Vec<f32>,
}

impl Scratch {
    /// For heads of this width.
    pub fn new(head_dim: usize) -> Self {
        Self {
            scores: vec![0.0; MAX_QUERIES * SPAN],
            span: vec![0.0; MAX_QUERIES * head_dim],
        }
    }
}

/// Attends with up to [`MAX_QUERIES`] queries of one sequence to one key–value head.
/// `pages[i]` is the i-th page of the sequence for that head; `out[i]` takes the result of
/// `queries[i]`, `head_dim` numbers each.
///
/// # Panics
/// When shapes do not fit, a query sees no token, or its pages are missing.
pub fn attend(
    isa: Isa,
    queries: &[Query<'_>],
    pages: &[&[u32]],
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let Some(first) = queries.first() else { return };
    let hd = first.q.len();
    assert!(queries.len() <= MAX_QUERIES && hd.is_multiple_of(LANES));
    assert!(out.len() == queries.len() * hd && scratch.span.len() >= queries.len() * hd);
    let longest = queries.iter().map(|q| q.len).max().unwrap_or(0);
    assert!(queries.iter().all(|q| q.q.len() == hd && q.len > 0));
    assert!(longest <= pages.len() * PAGE);
    assert!(pages.iter().all(|page| page.len() == page_words(hd)));
    // SAFETY: every shape that the kernel relies on was checked above.
    dispatch!(isa, kernel::<_>(
        queries: &[Query<'_>], pages: &[&[u32]], scratch: &mut Scratch, out: &mut [f32],
        hd: usize, longest: usize,
    ));
}

/// # Safety
/// See [`Lanes`]; shapes as [`attend`] checks them.
#[inline(always)]
unsafe fn kernel<L: Lanes>(
    queries: &[Query<'_>],
    pages: &[&[u32]],
    scratch: &mut Scratch,
    out: &mut [f32],
    hd: usize,
    longest: usize,
) {
    let n = queries.len();
    let mut running = [(f32::NEG_INFINITY, 0.0f32); MAX_QUERIES];
    out.fill(0.0);
    for start in (0..longest).step_by(SPAN) {
        let pages = &pages[start / PAGE..longest.min(start + SPAN).div_ceil(PAGE)];
        let mut lens = [0usize; MAX_QUERIES];
        for (len, query) in lens.iter_mut().zip(queries) {
            *len = query.len.saturating_sub(start).min(SPAN);
        }
        // SAFETY: the contract of this function; rows i..i+r are within `n`.
        unsafe {
            rows(n, |i, r| match r {
                4 => scores::<L, 4>(
                    &queries[i..],
                    pages,
                    &lens[i..],
                    hd,
                    row(&mut scratch.scores, i, SPAN),
                ),
                3 => scores::<L, 3>(
                    &queries[i..],
                    pages,
                    &lens[i..],
                    hd,
                    row(&mut scratch.scores, i, SPAN),
                ),
                2 => scores::<L, 2>(
                    &queries[i..],
                    pages,
                    &lens[i..],
                    hd,
                    row(&mut scratch.scores, i, SPAN),
                ),
                _ => scores::<L, 1>(
                    &queries[i..],
                    pages,
                    &lens[i..],
                    hd,
                    row(&mut scratch.scores, i, SPAN),
                ),
            });
            let mut spans = [(0.0f32, 0.0f32); MAX_QUERIES];
            for i in 0..n {
                if lens[i] > 0 {
                    spans[i] = softmax::<L>(row(&mut scratch.scores, i, SPAN), lens[i]);
                }
            }
            rows(n, |i, r| {
                let (p, o) = (
                    row(&mut scratch.scores, i, SPAN),
                    row(&mut scratch.span, i, hd),
                );
                match r {
                    4 => weighted::<L, 4>(p, pages, &lens[i..], hd, o),
                    3 => weighted::<L, 3>(p, pages, &lens[i..], hd, o),
                    2 => weighted::<L, 2>(p, pages, &lens[i..], hd, o),
                    _ => weighted::<L, 1>(p, pages, &lens[i..], hd, o),
                }
            });
            for i in 0..n {
                if lens[i] > 0 {
                    let (o, total) = (row(&mut scratch.span, i, hd), row(out, i, hd));
                    running[i] = merge::<L>(running[i], spans[i], o, total, hd);
                }
            }
        }
    }
    for (i, (_, sum)) in running.iter().enumerate().take(n) {
        // SAFETY: the contract of this function.
        unsafe {
            let total = row(out, i, hd);
            let scale = L::splat(1.0 / sum);
            for d in (0..hd).step_by(LANES) {
                L::load(total.add(d)).mul(scale).store(total.add(d));
            }
        }
    }
}

/// Row `i` of a matrix of `width` columns.
#[inline(always)]
fn row(matrix: &mut [f32], i: usize, width: usize) -> *mut f32 {
    matrix[i * width..].as_mut_ptr()
}

/// Rows in groups of four: as many as fit the registers.
#[inline(always)]
fn rows(n: usize, mut group: impl FnMut(usize, usize)) {
    for i in (0..n).step_by(4) {
        group(i, (n - i).min(4));
    }
}

/// `out[r][t] = q[r] · k[t]`, summed over the dims in ascending order.
#[inline(always)]
unsafe fn scores<L: Lanes, const R: usize>(
    queries: &[Query<'_>],
    pages: &[&[u32]],
    lens: &[usize],
    hd: usize,
    out: *mut f32,
) {
    let len = lens[..R].iter().copied().max().unwrap_or(0);
    let q: [*const f32; R] = std::array::from_fn(|r| queries[r].q.as_ptr());
    // SAFETY: `queries[r].q` has `hd` elements, a page `PAGE * hd` words, `out` R·SPAN.
    unsafe {
        for tile in 0..len.div_ceil(LANES) {
            let keys = pages[tile / 2].as_ptr().add(tile % 2 * (hd / 2 * LANES));
            let mut acc = [L::splat(0.0); R];
            for d in 0..hd / 2 {
                let (even, odd) = L::bf16_pairs(keys.add(d * LANES));
                for r in 0..R {
                    acc[r] = even.fma(L::splat(*q[r].add(2 * d)), acc[r]);
                }
                for r in 0..R {
                    acc[r] = odd.fma(L::splat(*q[r].add(2 * d + 1)), acc[r]);
                }
            }
            for r in 0..R {
                acc[r].store(out.add(r * SPAN + tile * LANES));
            }
        }
    }
}

/// Turns the first `len` scores of a span into weights exp(s - max), the others into zeros.
/// Returns the maximum and the sum of the weights.
#[inline(always)]
unsafe fn softmax<L: Lanes>(scores: *mut f32, len: usize) -> (f32, f32) {
    // SAFETY: `scores` has SPAN elements.
    unsafe {
        let mut s: [L; SPAN / LANES] = std::array::from_fn(|j| {
            L::load(scores.add(j * LANES)).first(len.saturating_sub(j * LANES))
        });
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
/// length have weight zero and leave its sum as it is.
#[inline(always)]
unsafe fn weighted<L: Lanes, const R: usize>(
    p: *const f32,
    pages: &[&[u32]],
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
    pages: &[&[u32]],
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
            let values = pages[page].as_ptr().add(PAGE / 2 * hd + inner * hd + d);
            for c in 0..C {
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
    (max, sum): (f32, f32),
    (span_max, span_sum): (f32, f32),
    span: *const f32,
    total: *mut f32,
    hd: usize,
) -> (f32, f32) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{isas, random};

    fn pages_of(keys: &[f32], values: &[f32], hd: usize) -> Vec<Vec<u32>> {
        let tokens = keys.len() / hd;
        // Stale contents of a previous owner: NaN everywhere.
        let mut pages = vec![vec![0x7fc0_7fc0; page_words(hd)]; tokens.div_ceil(PAGE)];
        for t in 0..tokens {
            let at = t * hd..(t + 1) * hd;
            append(
                &mut pages[t / PAGE],
                t % PAGE,
                &keys[at.clone()],
                &values[at],
            );
        }
        pages
    }

    fn run(isa: Isa, queries: &[Query<'_>], pages: &[Vec<u32>]) -> Vec<f32> {
        let hd = queries[0].q.len();
        let mut out = vec![0.0; queries.len() * hd];
        let pages: Vec<&[u32]> = pages.iter().map(Vec::as_slice).collect();
        attend(isa, queries, &pages, &mut Scratch::new(hd), &mut out);
        out
    }

    fn round(x: &[f32]) -> Vec<f64> {
        x.iter()
            .map(|&v| half::bf16::from_f32(v).to_f64())
            .collect()
    }

    #[test]
    fn follows_the_definition() {
        for (hd, tokens) in [(64, 1), (64, 33), (80, 64), (128, 65), (64, 300), (96, 129)] {
            let (k, v) = (random(tokens * hd, 1), random(tokens * hd, 2));
            let q: Vec<f32> = random(hd, 3).iter().map(|x| x * 3.0).collect();
            let out = run(
                Isa::detect(),
                &[Query { q: &q, len: tokens }],
                &pages_of(&k, &v, hd),
            );
            let (k, v) = (round(&k), round(&v));
            let scores: Vec<f64> = (0..tokens)
                .map(|t| (0..hd).map(|d| f64::from(q[d]) * k[t * hd + d]).sum())
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..hd {
                let exact: f64 =
                    (0..tokens).map(|t| weights[t] * v[t * hd + d]).sum::<f64>() / total;
                assert!(
                    (f64::from(out[d]) - exact).abs() < 1e-5,
                    "{hd} {tokens} {d}"
                );
            }
        }
    }

    #[test]
    fn batch_and_instruction_set_change_no_bit() {
        for hd in [64, 80] {
            let tokens = 150;
            let (k, v) = (random(tokens * hd, 4), random(tokens * hd, 5));
            let pages = pages_of(&k, &v, hd);
            let q = random(30 * hd, 6);
            let queries: Vec<Query<'_>> = (0..30)
                .map(|i| Query {
                    q: &q[i * hd..(i + 1) * hd],
                    len: 1 + i * 5,
                })
                .collect();
            let together = run(Isa::Scalar, &queries, &pages);
            assert!(together.iter().all(|x| x.is_finite()));
            for isa in isas() {
                assert_eq!(run(isa, &queries, &pages), together, "{isa:?}");
                for (i, query) in queries.iter().enumerate() {
                    // Alone, and as if the tokens after it had never been written.
                    let len = query.len * hd;
                    let own = pages_of(&k[..len], &v[..len], hd);
                    assert_eq!(
                        run(isa, &[*query], &own),
                        together[i * hd..(i + 1) * hd],
                        "{isa:?} {i}"
                    );
                }
            }
        }
    }
}
