//! The dots for x86-64.

// SAFETY of every block below: the trait's contract gives the instruction set, and valid
// pointers where there are any.

use std::arch::asm;
use std::arch::x86_64::*;

use super::dot::{Dot, Part};
use crate::quant::QuantBlock;
use crate::simd::{Avx2, Avx512, Lanes};

/// Four activations as one word.
#[inline(always)]
fn word(act: &QuantBlock, group: usize) -> i32 {
    let (words, _) = act.values.as_chunks::<4>();
    i32::from_ne_bytes(words[group].map(|v| v as u8))
}

impl Dot for Avx512 {
    const ROWS: usize = 8;
    const MANY: Option<usize> = Some(64);

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
    unsafe fn dots<const V: usize, const NARROW: bool, const M: usize>(
        tile: *const u8,
        acts: *const QuantBlock,
        part: Part,
        zero: i32,
    ) -> [Self; M] {
        unsafe {
            let mut dots = [Self(_mm512_setzero_ps()); M];
            let quants = columns::<V>(tile);
            let (from, to) = part.groups();
            for (i, out) in dots.iter_mut().enumerate() {
                let act = &*acts.add(i);
                let mut dot = _mm512_set1_epi32(zero * part.neg_sum(act));
                for g in from..to {
                    dot = _mm512_dpbusd_epi32(dot, quants[g], _mm512_set1_epi32(word(act, g)));
                }
                *out = Self(_mm512_cvtepi32_ps(dot));
            }
            dots
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

/// The quants of a tile: vector g holds the columns 4g..4g+4.
///
/// # Safety
/// The machine has AVX-512, and the tile is there.
#[inline(always)]
unsafe fn columns<const V: usize>(tile: *const u8) -> [__m512i; 8] {
    unsafe {
        let mask = _mm512_set1_epi8(0xf);
        let mut quants = [_mm512_setzero_si512(); 8];
        for v in 0..V {
            let x = _mm512_loadu_si512(tile.add(64 * v).cast());
            if V == 8 {
                quants[v] = x;
            } else {
                quants[2 * v] = _mm512_and_si512(x, mask);
                quants[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask);
            }
        }
        quants
    }
}

impl Dot for Avx2 {
    const ROWS: usize = 4;
    const MANY: Option<usize> = Some(16);

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

    /// A tile is unpacked four columns at a time: beside the sums of four rows there is no room for it.
    #[inline(always)]
    unsafe fn dots<const V: usize, const NARROW: bool, const M: usize>(
        tile: *const u8,
        acts: *const QuantBlock,
        part: Part,
        zero: i32,
    ) -> [Self; M] {
        unsafe {
            let low = nibbles::<V, NARROW, M>(tile, false, acts, part);
            let high = if V == 8 && !NARROW {
                nibbles::<V, NARROW, M>(tile, true, acts, part)
            } else {
                [[_mm256_setzero_si256(); 2]; M]
            };
            let mut dots = [Self::splat(0.0); M];
            for (i, dot) in dots.iter_mut().enumerate() {
                let start = _mm256_set1_epi32(zero * part.neg_sum(&*acts.add(i)));
                let mut sums = [start; 2];
                for (h, sum) in sums.iter_mut().enumerate() {
                    let high = _mm256_slli_epi32::<4>(high[i][h]);
                    *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(low[i][h], high));
                }
                *dot = Self(_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1]));
            }
            dots
        }
    }
}

/// The sums of four bits of each quant times activations, of `M` rows and both halves of a strip:
/// the only four, or the low or the `high` ones of eight.
///
/// Each sum is [held](hold) in its register from group to group, or the compiler would take the
/// groups apart, and keep them in memory.
///
/// # Safety
/// The machine has AVX2, and the pointers are valid for a tile and `M` blocks.
#[inline(always)]
unsafe fn nibbles<const V: usize, const NARROW: bool, const M: usize>(
    tile: *const u8,
    high: bool,
    acts: *const QuantBlock,
    part: Part,
) -> [[__m256i; 2]; M] {
    unsafe {
        let mut pairs = [[_mm256_setzero_si256(); 2]; M];
        let (from, to) = part.groups();
        if V == 8 {
            for g in from..to {
                let quants = halves(tile, g);
                let quants = match (NARROW, high) {
                    (true, _) => quants,
                    (_, false) => low_bits(quants),
                    (_, true) => high_bits(quants),
                };
                add(&mut pairs, quants, acts, g);
            }
        } else {
            // A vector has eight columns, the second four in the high bits.
            for vector in from / 2..to / 2 {
                let quants = halves(tile, vector);
                add(&mut pairs, low_bits(quants), acts, 2 * vector);
                add(&mut pairs, high_bits(quants), acts, 2 * vector + 1);
            }
        }
        let one = _mm256_set1_epi16(1);
        for pairs in &mut pairs {
            for sums in pairs {
                *sums = _mm256_madd_epi16(*sums, one);
            }
        }
        pairs
    }
}

/// Adds the products of four columns.
///
/// # Safety
/// As [`nibbles`].
#[inline(always)]
unsafe fn add<const M: usize>(
    pairs: &mut [[__m256i; 2]; M],
    quants: [__m256i; 2],
    acts: *const QuantBlock,
    group: usize,
) {
    unsafe {
        for (i, pairs) in pairs.iter_mut().enumerate() {
            let act = _mm256_set1_epi32(word(&*acts.add(i), group));
            for (pairs, quants) in pairs.iter_mut().zip(quants) {
                // Eight sums of two products of at most 15 * 127 fit in 16 bits.
                let products = _mm256_maddubs_epi16(quants, act);
                *pairs = hold(_mm256_add_epi16(*pairs, products));
            }
        }
    }
}

/// A vector of a tile: the rows below eight, and the others.
///
/// # Safety
/// As [`nibbles`].
#[inline(always)]
unsafe fn halves(tile: *const u8, vector: usize) -> [__m256i; 2] {
    unsafe {
        let start: *const __m256i = tile.add(64 * vector).cast();
        [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))]
    }
}

/// The low four bits of each byte.
#[target_feature(enable = "avx2")]
#[inline]
fn low_bits([a, b]: [__m256i; 2]) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(0xf);
    [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)]
}

/// The high four bits of each byte.
#[target_feature(enable = "avx2")]
#[inline]
fn high_bits([a, b]: [__m256i; 2]) -> [__m256i; 2] {
    low_bits([_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)])
}

/// The same, in a register.
#[target_feature(enable = "avx2")]
#[inline]
fn hold(mut sums: __m256i) -> __m256i {
    // SAFETY: there is no instruction.
    unsafe {
        asm!("/* {sums} */", sums = inout(ymm_reg) sums,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}
