//! How the scores of a span become what its values are weighted with.

use super::kept::{Kept, VECTORS, greatest, total};
use super::kernel::TILES;
use super::merge::Softmax;
use super::{Keys, MAX_QUERIES, Place, Query, SPAN};
use crate::math::exp2;
use crate::simd::{LANES, Lanes};

/// Turns the first `lens[r]` products of a span with each query into scores and these into weights
/// 2^(s - max), the others into zeros; what is kept of the values is weighted with the pairs in
/// `out`. The results are the maxima, the sums of the weights, and what weighted sums are to be
/// multiplied with, from query `first` on; -inf, 0 and 0 of a query that sees nothing of the span.
///
/// The queries go step by step beside each other: while one waits, another goes on.
///
/// # Safety
/// `products` has R·SPAN numbers, `out` a place for every two, and the pages are whole.
#[inline(always)]
pub(super) unsafe fn weights<L: Lanes, K: Kept<L>, const R: usize>(
    products: *const f32,
    (queries, lens): (&[Query<'_>], &[usize]),
    pages: &Keys,
    hd: usize,
    out: *mut Place,
    (softmax, factors, first): (&mut Softmax, &mut [f32; MAX_QUERIES], usize),
) {
    // SAFETY: the contract of this function.
    let [maxima, sums, by] = unsafe {
        if lens[..R].iter().all(|&len| len == SPAN) {
            weights_of::<L, K, R, true>(products, queries, pages, lens, hd, out)
        } else {
            weights_of::<L, K, R, false>(products, queries, pages, lens, hd, out)
        }
    };
    softmax.max[first..first + R].copy_from_slice(&maxima);
    softmax.sum[first..first + R].copy_from_slice(&sums);
    factors[first..first + R].copy_from_slice(&by);
}

/// [`weights`], of queries that see all of the span if it is `WHOLE`.
///
/// # Safety
/// As `weights`.
#[inline(always)]
unsafe fn weights_of<L: Lanes, K: Kept<L>, const R: usize, const WHOLE: bool>(
    products: *const f32,
    queries: &[Query<'_>],
    pages: &Keys,
    lens: &[usize],
    hd: usize,
    out: *mut Place,
) -> [[f32; R]; 3] {
    // SAFETY: the contract of this function.
    unsafe {
        let mut s = [[L::splat(0.0); VECTORS]; R];
        let [mut maxima, mut sums] = [[0.0; R]; 2];
        for j in 0..VECTORS {
            let keys = pages[j / TILES];
            for r in 0..R {
                let n = seen::<WHOLE>(lens[r], j);
                let products = L::load(products.add(r * SPAN + j * LANES));
                s[r][j] = match K::scales(keys, hd, j % TILES * LANES, n) {
                    Some(scales) => products
                        .mul(scales.mul(L::splat(queries[r].scale)))
                        .first(n),
                    None => products.first(n),
                };
            }
        }
        for r in 0..R {
            maxima[r] = greatest(s[r]);
        }
        for (s, max) in s.iter_mut().zip(maxima) {
            let base = L::splat(max);
            for s in s {
                *s = exp2(s.sub(base));
            }
        }
        for r in 0..R {
            sums[r] = total(s[r]);
        }
        for j in 0..VECTORS {
            let values = pages[j / TILES].add(K::TYPE.half_words(hd));
            for r in 0..R {
                let n = seen::<WHOLE>(lens[r], j);
                if let Some(scales) = K::scales(values, hd, j % TILES * LANES, n) {
                    s[r][j] = s[r][j].mul(scales);
                }
            }
        }
        [maxima, sums, K::weigh(s, out)]
    }
}

/// Tokens that a query sees of vector `j` of a span, of which it sees `len`.
#[inline(always)]
fn seen<const WHOLE: bool>(len: usize, j: usize) -> usize {
    if WHOLE {
        LANES
    } else {
        len.saturating_sub(j * LANES)
    }
}
