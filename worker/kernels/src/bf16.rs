//! Brain floats: what keys, values, queries and the weights of attention are rounded to.
//!
//! Numbers below [`LEAST`] become zero. A product of two others is then a multiple of 2⁻¹²⁴,
//! and so is every rounded sum of such products: none is ever subnormal. An instruction that
//! flushes subnormals, as AVX-512 BF16 does, gives the same bits as one that does not.

use crate::Isa;
use crate::simd::{LANES, Lanes, dispatch};

/// The least magnitude that is kept: 2⁻⁵⁵.
const LEAST: u32 = (127 - 55) << 23;

/// The brain float nearest to `x`, ties to even, in the low half; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if magnitude > 0x7f80_0000 {
        0x7fc0
    } else if magnitude < LEAST {
        0
    } else {
        rounded
    }
}

/// Rounds `x` to pairs of brain floats: element 2i in the low half of word i.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn pairs(isa: Isa, x: &[f32], out: &mut [u32]) {
    assert_eq!(x.len(), 2 * out.len());
    // SAFETY: the kernel needs the features alone.
    dispatch!(isa, pairs_of::<_>(x: &[f32], out: &mut [u32]));
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn pairs_of<L: Lanes>(x: &[f32], out: &mut [u32]) {
    for (out, x) in out.iter_mut().zip(x.as_chunks::<2>().0) {
        *out = bf16(x[0]) | bf16(x[1]) << 16;
    }
}

/// How pairs of brain floats are multiplied and added up.
///
/// # Safety
/// As [`Lanes`].
pub(crate) trait Pairs<L: Lanes> {
    /// Whether registers hold the sums of twice as many lanes.
    const WIDE: bool;
    /// Sixteen pairs.
    type Words: Copy;
    /// One pair, as [`dot`](Self::dot) multiplies with it: at most 8 bytes.
    type By: Copy;
    /// The pair in a word.
    unsafe fn by(word: u32) -> Self::By;
    /// Rounds sixteen lanes to eight pairs.
    unsafe fn put(lanes: L, p: *mut Self::By);
    /// Sixteen words.
    unsafe fn load(p: *const u32) -> Self::Words;
    /// `sum + high(words) * high(by) + low(words) * low(by)`, rounded after each addition.
    unsafe fn dot(sum: L, words: Self::Words, by: *const Self::By) -> L;
    /// Stores sixteen pairs, each lane rounded to nearest even; all lanes are zero or normal.
    #[inline(always)]
    unsafe fn round(low: L, high: L, p: *mut u32) {
        let [mut lows, mut highs] = [[0.0; LANES]; 2];
        // SAFETY: the caller vouches for sixteen words.
        unsafe {
            low.store(lows.as_mut_ptr());
            high.store(highs.as_mut_ptr());
            let pairs = std::array::from_fn(|i| nearest(lows[i]) >> 16 | nearest(highs[i]) & HIGH);
            p.cast::<[u32; LANES]>().write_unaligned(pairs);
        }
    }
}

/// The upper half of a word.
const HIGH: u32 = 0xffff_0000;

/// A normal number, rounded to nearest even in its upper half.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1))
}

/// By fused multiply-adds.
pub(crate) struct Fused;

impl<L: Lanes> Pairs<L> for Fused {
    const WIDE: bool = L::REGISTERS >= 32;
    /// The lows and the highs.
    type Words = (L, L);
    /// The low and the high: a load spreads one over the lanes, and no other instruction.
    type By = [f32; 2];
    #[inline(always)]
    unsafe fn by(word: u32) -> Self::By {
        [f32::from_bits(word << 16), f32::from_bits(word & HIGH)]
    }
    #[inline(always)]
    unsafe fn put(lanes: L, p: *mut Self::By) {
        // SAFETY: the caller vouches for sixteen numbers.
        unsafe { lanes.to_bf16().store(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> Self::Words {
        // SAFETY: the caller's contract.
        unsafe { L::bf16_pairs(p) }
    }
    #[inline(always)]
    unsafe fn dot(sum: L, (low, high): Self::Words, by: *const Self::By) -> L {
        // SAFETY: the caller's contract. The products are exact, so fusing rounds nothing away.
        unsafe {
            let by: *const f32 = by.cast();
            low.fma(L::splat(*by), high.fma(L::splat(*by.add(1)), sum))
        }
    }
}

/// By the instruction of AVX-512 BF16: one addition after the other, each rounded to nearest
/// even, subnormals flushed (Intel SDM, VDPBF16PS).
#[cfg(target_arch = "x86_64")]
pub(crate) struct Native;

#[cfg(target_arch = "x86_64")]
mod native {
    use std::arch::x86_64::*;

    use super::{Native, Pairs};
    use crate::simd::{Avx512, Lanes};

    // SAFETY of every block below: the caller runs with AVX-512 BF16, and its pointers are valid.
    impl Pairs<Avx512> for Native {
        const WIDE: bool = true;
        type Words = __m512i;
        type By = u32;
        #[inline(always)]
        unsafe fn by(word: u32) -> u32 {
            word
        }
        #[inline(always)]
        unsafe fn put(lanes: Avx512, p: *mut u32) {
            unsafe { lanes.to_bf16().store_high(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load(p: *const u32) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(sum: Avx512, words: __m512i, by: *const u32) -> Avx512 {
            unsafe {
                let by = _mm512_set1_epi32(*by as i32);
                // A cast of 512 bits to 512 bits, which has no intrinsic of its own.
                let [words, by] = [words, by].map(|x| std::mem::transmute::<__m512i, __m512bh>(x));
                Avx512(_mm512_dpbf16_ps(sum.0, words, by))
            }
        }
        #[inline(always)]
        unsafe fn round(low: Avx512, high: Avx512, p: *mut u32) {
            unsafe {
                // The lows, then the highs.
                let halves = _mm512_cvtne2ps_pbh(high.0, low.0);
                let halves = std::mem::transmute::<__m512bh, __m512i>(halves);
                let order = _mm512_add_epi32(
                    _mm512_set1_epi32(16 << 16),
                    _mm512_mullo_epi32(
                        _mm512_set1_epi32(0x1_0001),
                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                    ),
                );
                _mm512_storeu_si512(p.cast(), _mm512_permutexvar_epi16(order, halves));
            }
        }
    }
}

/// Calls the generic kernel `$kernel::<L, P>(args…)` with the lanes and the pairs of `$isa`.
macro_rules! dispatch_pairs {
    ($isa:expr, $kernel:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        if $isa.checked() == $crate::Isa::Avx512Bf16 {
            #[target_feature(
                enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,f16c"
            )]
            unsafe fn native($($arg: $ty),*) {
                // SAFETY: the features are enabled here; the rest is the caller's contract.
                unsafe { $kernel::<$crate::simd::Avx512, $crate::bf16::Native>($($arg),*) }
            }
            // SAFETY: `checked` found the features.
            unsafe { native($($arg),*) };
        } else {
            use $crate::bf16::Fused;
            $crate::simd::dispatch!($isa, $kernel::<_, Fused>($($arg: $ty),*));
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            use $crate::bf16::Fused;
            $crate::simd::dispatch!($isa, $kernel::<_, Fused>($($arg: $ty),*));
        }
    }};
}
pub(crate) use dispatch_pairs;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{isas, random};

    #[test]
    fn rounds_to_nearest_even_and_drops_what_is_tiny() {
        for x in random(10_000, 1) {
            for scale in [1.0, 1e-3, 1e30] {
                let exact = half::bf16::from_f32(x * scale);
                assert_eq!(bf16(x * scale), u32::from(exact.to_bits()));
            }
        }
        assert_eq!(bf16(f32::from_bits(LEAST)), LEAST >> 16);
        for (x, expected) in [
            (2f32.powi(-56), 0),
            (-1e-40, 0),
            (-0.0, 0),
            (f32::NAN, 0x7fc0),
        ] {
            assert_eq!(bf16(x), expected);
        }
        assert_eq!(bf16(f32::NEG_INFINITY), 0xff80);
    }

    /// Sums of products of pairs of any size, cancelling ones among them.
    #[inline(always)]
    unsafe fn sums<L: Lanes, P: Pairs<L>>(words: &[u32], by: &[u32], out: &mut [f32; LANES]) {
        // SAFETY: a word for every lane of each sum.
        unsafe {
            let mut sum = L::splat(0.0);
            for (words, &by) in words.chunks_exact(LANES).zip(by) {
                sum = P::dot(sum, P::load(words.as_ptr()), &P::by(by));
            }
            sum.store(out.as_mut_ptr());
        }
    }

    #[test]
    fn products_have_the_same_bits_everywhere() {
        for seed in 0..200 {
            let power = |i: usize| 2f32.powi((i * 37 % 100) as i32 - 60);
            let values = |n, seed| -> Vec<u32> {
                let x: Vec<f32> = random(2 * n, seed)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| x * power(i))
                    .collect();
                x.as_chunks::<2>()
                    .0
                    .iter()
                    .map(|x| bf16(x[0]) | bf16(x[1]) << 16)
                    .collect()
            };
            let (words, by) = (values(8 * LANES, seed), values(8, seed + 1000));
            let (words, by) = (words.as_slice(), by.as_slice());
            let mut first = [0.0; LANES];
            let out = &mut first;
            // SAFETY: the scalar lanes need no features.
            unsafe { sums::<crate::simd::Scalar, Fused>(words, by, out) };
            for isa in isas() {
                let mut got = [1.0; LANES];
                let out = &mut got;
                // SAFETY: as above; the features are those of `isa`.
                dispatch_pairs!(isa, sums(words: &[u32], by: &[u32], out: &mut [f32; LANES]));
                assert_eq!(got.map(f32::to_bits), first.map(f32::to_bits), "{isa:?}");
            }
        }
    }
}
