//! How what a page keeps is multiplied.

use std::marker::PhantomData;

use super::store::{KvType, MOST_INT16};
use super::{Place, SPAN};
use crate::bf16::Pairs;
use crate::int16;
use crate::quant::scales;
use crate::simd::{LANES, Lanes};

/// Vectors of the tokens of a span.
pub(super) const VECTORS: usize = SPAN / LANES;

/// The greatest number of a span.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(super) unsafe fn greatest<L: Lanes>([a, b, c, d]: [L; VECTORS]) -> f32 {
    // SAFETY: the contract of this function.
    unsafe { a.max(b).max(c.max(d)).maximum() }
}

/// The sum of the numbers of a span.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(super) unsafe fn total<L: Lanes>([a, b, c, d]: [L; VECTORS]) -> f32 {
    // SAFETY: the contract of this function.
    unsafe { a.add(b).add(c.add(d)).sum() }
}

/// How attention reads what is kept so, and multiplies it.
///
/// # Safety
/// As [`Lanes`]. A half is where the keys or the values of a page of the type begin, and what is
/// read is of that page.
pub(super) trait Kept<L: Lanes> {
    /// The type.
    const TYPE: KvType;
    /// Pairs in a word.
    const PAIRS: usize;
    /// Whether registers hold the sums of twice as many lanes.
    const WIDE: bool;
    /// Sixteen pairs.
    type Words: Copy;
    /// One pair, as [`dot`](Self::dot) multiplies with it: at most 8 bytes.
    type By: Copy;
    /// Sixteen sums.
    type Sums: Copy;
    /// The pair in a word of a query.
    unsafe fn by(word: u32) -> Self::By;
    /// Sixteen pairs.
    unsafe fn load(line: *const u32) -> Self::Words;
    /// Zeros.
    unsafe fn none() -> Self::Sums;
    /// `sums + high(words) * high(by) + low(words) * low(by)`.
    unsafe fn dot(sums: Self::Sums, words: Self::Words, by: *const Self::By) -> Self::Sums;
    /// The sums.
    unsafe fn floats(sums: Self::Sums) -> L;
    /// What the numbers of sixteen tokens were divided by, from `token` on; 0 beyond the first
    /// `n` of them, whatever the page had there. `None` if they were not.
    unsafe fn scales(half: *const u32, hd: usize, token: usize, n: usize) -> Option<L>;
    /// Makes the weights of queries the pairs that values are multiplied with; gives what the sums
    /// are to be multiplied with.
    unsafe fn weigh<const R: usize>(weights: [[L; VECTORS]; R], out: *mut Place) -> [f32; R];

    /// Where sixteen pairs lie, from the pair `at` on.
    #[inline(always)]
    fn line(half: *const u32, at: usize) -> *const u32 {
        half.wrapping_add(at / Self::PAIRS)
    }
}

/// See [`KvType::Bf16`]; multiplied as `P` does.
pub(super) struct Bf16<P>(PhantomData<P>);

impl<L: Lanes, P: Pairs<L>> Kept<L> for Bf16<P> {
    const TYPE: KvType = KvType::Bf16;
    const PAIRS: usize = 1;
    const WIDE: bool = P::WIDE;
    type Words = P::Words;
    type By = P::By;
    type Sums = L;
    #[inline(always)]
    unsafe fn by(word: u32) -> P::By {
        // SAFETY: the caller's contract.
        unsafe { P::by(word) }
    }
    #[inline(always)]
    unsafe fn load(line: *const u32) -> P::Words {
        // SAFETY: the caller's contract.
        unsafe { P::load(line) }
    }
    #[inline(always)]
    unsafe fn none() -> L {
        // SAFETY: the caller's contract.
        unsafe { L::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn dot(sums: L, words: P::Words, by: *const P::By) -> L {
        // SAFETY: the caller's contract.
        unsafe { P::dot(sums, words, by) }
    }
    #[inline(always)]
    unsafe fn floats(sums: L) -> L {
        sums
    }
    #[inline(always)]
    unsafe fn scales(_: *const u32, _: usize, _: usize, _: usize) -> Option<L> {
        None
    }
    #[inline(always)]
    unsafe fn weigh<const R: usize>(weights: [[L; VECTORS]; R], out: *mut Place) -> [f32; R] {
        for (r, weights) in weights.into_iter().enumerate() {
            for (j, weights) in weights.into_iter().enumerate() {
                // SAFETY: the caller vouches for the pairs of a span of every query.
                unsafe {
                    let row = out.add(r * (SPAN / 2)).cast::<P::By>();
                    P::put(weights, row.add(j * LANES / 2));
                }
            }
        }
        [1.0; R]
    }
}

/// Integers, `PAIRS` pairs in a word.
pub(super) struct Integers<const PAIRS: usize>;

/// See [`KvType::Int16`].
pub(super) type Int16 = Integers<1>;

/// See [`KvType::Int8`]; multiplied as int16.
pub(super) type Int8 = Integers<2>;

/// Greatest weight: 64 products with values sum to less than 2³¹.
const MOST_WEIGHT: f32 = 8191.0;
const _: () = assert!(SPAN as f64 * MOST_INT16 as f64 * MOST_WEIGHT as f64 <= i32::MAX as f64);

impl<L: int16::Int16, const PAIRS: usize> Kept<L> for Integers<PAIRS> {
    const TYPE: KvType = match PAIRS {
        1 => KvType::Int16,
        _ => KvType::Int8,
    };
    const PAIRS: usize = PAIRS;
    const WIDE: bool = L::REGISTERS >= 32;
    type Words = L::Words;
    type By = u32;
    type Sums = L::Sums;
    #[inline(always)]
    unsafe fn by(word: u32) -> u32 {
        word
    }
    #[inline(always)]
    unsafe fn load(line: *const u32) -> L::Words {
        // SAFETY: the caller's contract.
        unsafe {
            match <Self as Kept<L>>::TYPE {
                KvType::Int8 => L::bytes(line.cast()),
                _ => L::words(line),
            }
        }
    }
    #[inline(always)]
    unsafe fn none() -> L::Sums {
        // SAFETY: the caller's contract.
        unsafe { L::none() }
    }
    #[inline(always)]
    unsafe fn dot(sums: L::Sums, words: L::Words, by: *const u32) -> L::Sums {
        // SAFETY: the caller's contract.
        unsafe { L::dot(sums, words, *by) }
    }
    #[inline(always)]
    unsafe fn floats(sums: L::Sums) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::floats(sums) }
    }
    #[inline(always)]
    unsafe fn scales(half: *const u32, hd: usize, token: usize, n: usize) -> Option<L> {
        let at = <Self as Kept<L>>::TYPE.scales_at(hd) + token;
        // SAFETY: the caller's contract.
        unsafe {
            let scales = L::load(half.add(at).cast());
            // `max` returns its second operand on NaN: a fault survives.
            Some(L::splat(0.0).max(scales.first(n)))
        }
    }
    #[inline(always)]
    unsafe fn weigh<const R: usize>(weights: [[L; VECTORS]; R], out: *mut Place) -> [f32; R] {
        // SAFETY: the caller vouches for the pairs of a span of every query.
        unsafe { quantised(weights, out) }
    }
}

/// Stores weights as integers; gives what these are to be multiplied with.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn quantised<L: int16::Int16, const R: usize>(
    weights: [[L; VECTORS]; R],
    out: *mut Place,
) -> [f32; R] {
    let mut factors = [0.0; R];
    let mut inverses = [0.0; R];
    // SAFETY: the caller vouches for the numbers of a span of every query.
    unsafe {
        for r in 0..R {
            let max = greatest(weights[r]);
            (factors[r], inverses[r]) = scales(max.to_bits(), MOST_WEIGHT);
        }
        for r in 0..R {
            let inverse = L::splat(inverses[r]);
            let row = out.add(r * (SPAN / 2)).cast::<i16>();
            for (j, weights) in weights[r].into_iter().enumerate() {
                weights.mul(inverse).put(row.add(j * LANES));
            }
        }
        for r in 0..R {
            // A maximum may pass over what is no number; a sum does not.
            factors[r] += 0.0 * total(weights[r]);
        }
    }
    factors
}
