//! The dots for x86-64.

// SAFETY of every block below: the trait's contract gives the instruction set, and valid
// pointers where there are any.

use std::arch::x86_64::*;

use super::dot::{Dot, Part};
use crate::quant::QuantBlock;
use crate::simd::{Avx2, Avx512};

/// Four activations as one word.
#[inline(always)]
fn word(act: &QuantBlock, group: usize) -> i32 {
    let (words, _) = act.values.as_chunks::<4>();
    i32::from_ne_bytes(words[group].map(|v| v as u8))
}

impl Dot for Avx512 {
    const ROWS: usize = 8;
    const MANY: usize = 64;

    /// Vector g holds the columns 4g..4g+4.
    type Quants = [__m512i; 8];

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn unpack<const V: usize>(p: *const u8) -> Self::Quants {
        unsafe {
            let mask = _mm512_set1_epi8(0xf);
            let mut w = [_mm512_setzero_si512(); 8];
            for v in 0..V {
                let x = _mm512_loadu_si512(p.add(64 * v).cast());
                if V == 8 {
                    w[v] = x;
                } else {
                    w[2 * v] = _mm512_and_si512(x, mask);
                    w[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask);
                }
            }
            w
        }
    }

    #[inline(always)]
    unsafe fn dot<const V: usize>(
        quants: &Self::Quants,
        act: &QuantBlock,
        part: Part,
        zero: i32,
    ) -> Self {
        unsafe {
            let mut dot = _mm512_set1_epi32(zero * part.neg_sum(act));
            let (from, to) = part.groups();
            for g in from..to {
                dot = _mm512_dpbusd_epi32(dot, quants[g], _mm512_set1_epi32(word(act, g)));
            }
            Self(_mm512_cvtepi32_ps(dot))
        }
    }

    #[inline(always)]
    unsafe fn one_and<const BITS: u32>(p: *const u8, at: u32) -> Self {
        unsafe {
            let words = _mm512_loadu_si512(p.cast());
            let shift = (23 - BITS).wrapping_sub(at) as i32;
            let moved = if shift >= 0 {
                _mm512_sllv_epi32(words, _mm512_set1_epi32(shift))
            } else {
                _mm512_srlv_epi32(words, _mm512_set1_epi32(-shift))
            };
            let mask = _mm512_set1_epi32(((1 << BITS) - 1) << (23 - BITS));
            let one = _mm512_set1_epi32(1f32.to_bits() as i32);
            // `moved & mask | one`
            let bits = _mm512_ternarylogic_epi32::<0xea>(moved, mask, one);
            Self(_mm512_castsi512_ps(bits))
        }
    }
}

impl Dot for Avx2 {
    const ROWS: usize = 4;

    /// Plane 0 holds the low four bits, plane 1 the high ones of 8-bit quants; in it, half h of
    /// group g the columns 4g..4g+4 of the rows 8h..8h+8.
    type Quants = [[[__m256i; 2]; 8]; 2];

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> Self {
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self {
        #[inline(always)]
        unsafe fn half(p: *const u8) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        unsafe { Self(half(p), half(p.add(16))) }
    }

    #[inline(always)]
    unsafe fn unpack<const V: usize>(p: *const u8) -> Self::Quants {
        unsafe {
            let mask = _mm256_set1_epi8(0xf);
            let mut w = [[[_mm256_setzero_si256(); 2]; 8]; 2];
            for v in 0..V {
                for h in 0..2 {
                    let x = _mm256_loadu_si256(p.add(64 * v + 32 * h).cast());
                    let low = _mm256_and_si256(x, mask);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask);
                    if V == 8 {
                        (w[0][v][h], w[1][v][h]) = (low, high);
                    } else {
                        (w[0][2 * v][h], w[0][2 * v + 1][h]) = (low, high);
                    }
                }
            }
            w
        }
    }

    #[inline(always)]
    unsafe fn dot<const V: usize>(
        quants: &Self::Quants,
        act: &QuantBlock,
        part: Part,
        zero: i32,
    ) -> Self {
        unsafe {
            let start = _mm256_set1_epi32(zero * part.neg_sum(act));
            let mut sums = [start; 2];
            for (h, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_add_epi32(*sum, nibbles(&quants[0], act, part, h));
                if V == 8 {
                    let high = nibbles(&quants[1], act, part, h);
                    *sum = _mm256_add_epi32(*sum, _mm256_slli_epi32::<4>(high));
                }
            }
            Self(_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1]))
        }
    }
}

/// The sums of 4-bit quants times activations, of half the rows.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn nibbles(plane: &[[__m256i; 2]; 8], act: &QuantBlock, part: Part, h: usize) -> __m256i {
    unsafe {
        let mut pairs = _mm256_setzero_si256();
        let (from, to) = part.groups();
        for g in from..to {
            // Eight sums of two products of at most 15 * 127 fit in 16 bits.
            let activations = _mm256_set1_epi32(word(act, g));
            let products = _mm256_maddubs_epi16(plane[g][h], activations);
            pairs = _mm256_add_epi16(pairs, products);
        }
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}
