//! Sums of products of pairs of 16-bit integers: one instruction where there is one (VPDPWSSD,
//! VPMADDWD), exact everywhere.

use crate::simd::{LANES, Lanes, Scalar};

/// Lanes with sums of sixteen pairs.
///
/// # Safety
/// As [`Lanes`].
pub(crate) trait Int16: Lanes {
    /// Sixteen sums, of 32 bits each: what is beyond wraps.
    type Sums: Copy;
    /// Sixteen pairs, each a word: the first in its low half.
    type Words: Copy;
    /// Zeros.
    unsafe fn none() -> Self::Sums;
    /// Sixteen words.
    unsafe fn words(p: *const u32) -> Self::Words;
    /// Sixteen pairs of int8, one beside the other.
    unsafe fn bytes(p: *const i8) -> Self::Words;
    /// `sums + high(words) * high(by) + low(words) * low(by)`.
    unsafe fn dot(sums: Self::Sums, words: Self::Words, by: u32) -> Self::Sums;
    /// The sums, rounded to nearest even.
    unsafe fn floats(sums: Self::Sums) -> Self;
    /// Stores the nearest integers, ties to even, of lanes in ±32767.
    unsafe fn put(self, p: *mut i16);
}

/// The numbers of a word.
#[inline(always)]
fn halves(word: u32) -> [i32; 2] {
    [i32::from(word as i16), i32::from((word >> 16) as i16)]
}

impl Int16 for Scalar {
    type Sums = [i32; LANES];
    type Words = [u32; LANES];
    #[inline(always)]
    unsafe fn none() -> Self::Sums {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn words(p: *const u32) -> Self::Words {
        // SAFETY: the caller vouches for sixteen words.
        unsafe { p.cast::<[u32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn bytes(p: *const i8) -> Self::Words {
        // SAFETY: the caller vouches for sixteen pairs.
        let pairs = unsafe { p.cast::<[[i8; 2]; LANES]>().read_unaligned() };
        pairs.map(|[low, high]| {
            let [low, high] = [low, high].map(|x| u32::from(i16::from(x) as u16));
            low | high << 16
        })
    }
    #[inline(always)]
    unsafe fn dot(mut sums: Self::Sums, words: Self::Words, by: u32) -> Self::Sums {
        let by = halves(by);
        for (sum, word) in sums.iter_mut().zip(words) {
            let word = halves(word);
            let pair = (word[0] * by[0]).wrapping_add(word[1] * by[1]);
            *sum = sum.wrapping_add(pair);
        }
        sums
    }
    #[inline(always)]
    unsafe fn floats(sums: Self::Sums) -> Self {
        Self(sums.map(|sum| sum as f32))
    }
    #[inline(always)]
    unsafe fn put(self, p: *mut i16) {
        let numbers = self.0.map(|x| x.round_ties_even() as i16);
        // SAFETY: the caller vouches for sixteen numbers.
        unsafe { p.cast::<[i16; LANES]>().write_unaligned(numbers) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Int16;
    use crate::simd::{Avx2, Avx512};

    // SAFETY of every block below: the trait's contract gives the instruction set, and valid
    // pointers where there are any.
    impl Int16 for Avx512 {
        type Sums = __m512i;
        type Words = __m512i;
        #[inline(always)]
        unsafe fn none() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn words(p: *const u32) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn bytes(p: *const i8) -> __m512i {
            unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn dot(sums: __m512i, words: __m512i, by: u32) -> __m512i {
            unsafe { _mm512_dpwssd_epi32(sums, words, _mm512_set1_epi32(by as i32)) }
        }
        #[inline(always)]
        unsafe fn floats(sums: __m512i) -> Self {
            unsafe { Self(_mm512_cvtepi32_ps(sums)) }
        }
        #[inline(always)]
        unsafe fn put(self, p: *mut i16) {
            unsafe {
                let numbers = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0));
                _mm256_storeu_si256(p.cast(), numbers);
            }
        }
    }

    impl Int16 for Avx2 {
        type Sums = (__m256i, __m256i);
        type Words = (__m256i, __m256i);
        #[inline(always)]
        unsafe fn none() -> Self::Sums {
            unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
        }
        #[inline(always)]
        unsafe fn words(p: *const u32) -> Self::Words {
            unsafe {
                (
                    _mm256_loadu_si256(p.cast()),
                    _mm256_loadu_si256(p.add(8).cast()),
                )
            }
        }
        #[inline(always)]
        unsafe fn bytes(p: *const i8) -> Self::Words {
            unsafe {
                (
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(16).cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn dot(sums: Self::Sums, words: Self::Words, by: u32) -> Self::Sums {
            unsafe {
                let by = _mm256_set1_epi32(by as i32);
                (
                    _mm256_add_epi32(sums.0, _mm256_madd_epi16(words.0, by)),
                    _mm256_add_epi32(sums.1, _mm256_madd_epi16(words.1, by)),
                )
            }
        }
        #[inline(always)]
        unsafe fn floats(sums: Self::Sums) -> Self {
            unsafe { Self(_mm256_cvtepi32_ps(sums.0), _mm256_cvtepi32_ps(sums.1)) }
        }
        #[inline(always)]
        unsafe fn put(self, p: *mut i16) {
            unsafe {
                let numbers =
                    _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
                // Packing works in 128-bit halves.
                let numbers = _mm256_permute4x64_epi64::<0b11_01_10_00>(numbers);
                _mm256_storeu_si256(p.cast(), numbers);
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::Int16;
    use crate::simd::Neon;

    // SAFETY of every block below: the trait's contract gives the instruction set, and valid
    // pointers where there are any.
    impl Int16 for Neon {
        type Sums = [int32x4_t; 4];
        type Words = [int16x8_t; 4];
        #[inline(always)]
        unsafe fn none() -> Self::Sums {
            unsafe { [vdupq_n_s32(0); 4] }
        }
        #[inline(always)]
        unsafe fn words(p: *const u32) -> Self::Words {
            unsafe {
                let mut words = [vdupq_n_s16(0); 4];
                for (j, words) in words.iter_mut().enumerate() {
                    *words = vld1q_s16(p.add(4 * j).cast());
                }
                words
            }
        }
        #[inline(always)]
        unsafe fn bytes(p: *const i8) -> Self::Words {
            unsafe {
                let mut words = [vdupq_n_s16(0); 4];
                for (j, words) in words.iter_mut().enumerate() {
                    *words = vmovl_s8(vld1_s8(p.add(8 * j)));
                }
                words
            }
        }
        #[inline(always)]
        unsafe fn dot(mut sums: Self::Sums, words: Self::Words, by: u32) -> Self::Sums {
            unsafe {
                let by = vreinterpretq_s16_u32(vdupq_n_u32(by));
                for (sum, words) in sums.iter_mut().zip(words) {
                    let low = vmull_s16(vget_low_s16(words), vget_low_s16(by));
                    let high = vmull_high_s16(words, by);
                    *sum = vaddq_s32(*sum, vpaddq_s32(low, high));
                }
                sums
            }
        }
        #[inline(always)]
        unsafe fn floats(sums: Self::Sums) -> Self {
            unsafe {
                let [a, b, c, d] = sums;
                Self([
                    vcvtq_f32_s32(a),
                    vcvtq_f32_s32(b),
                    vcvtq_f32_s32(c),
                    vcvtq_f32_s32(d),
                ])
            }
        }
        #[inline(always)]
        unsafe fn put(self, p: *mut i16) {
            unsafe {
                for (j, lanes) in self.0.into_iter().enumerate() {
                    vst1_s16(p.add(4 * j), vmovn_s32(vcvtnq_s32_f32(lanes)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::dispatch;
    use crate::testing::isas;

    #[inline(always)]
    unsafe fn sums<L: Int16>(words: &[u32], by: &[u32], out: &mut [f32; LANES]) {
        // SAFETY: sixteen words for every one of `by`.
        unsafe {
            let mut sums = L::none();
            for (words, &by) in words.chunks_exact(LANES).zip(by) {
                sums = L::dot(sums, L::words(words.as_ptr()), by);
            }
            L::floats(sums).store(out.as_mut_ptr());
        }
    }

    #[inline(always)]
    unsafe fn put<L: Int16>(x: &[f32; LANES], out: &mut [i16; LANES]) {
        // SAFETY: sixteen lanes.
        unsafe { L::load(x.as_ptr()).put(out.as_mut_ptr()) }
    }

    #[test]
    fn sums_are_exact_and_wrap() {
        let mut state = 1u64;
        let mut word = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 32) as u32
        };
        let words: Vec<u32> = (0..40 * LANES).map(|_| word()).collect();
        let by: Vec<u32> = (0..40).map(|_| word()).collect();
        let (words, by) = (words.as_slice(), by.as_slice());
        let exact: [f32; LANES] = std::array::from_fn(|lane| {
            let products = by.iter().enumerate().map(|(i, &by)| {
                let (word, by) = (halves(words[i * LANES + lane]), halves(by));
                i64::from(word[0]) * i64::from(by[0]) + i64::from(word[1]) * i64::from(by[1])
            });
            products.sum::<i64>() as i32 as f32
        });
        for isa in isas() {
            let mut sum = [0.0; LANES];
            let out = &mut sum;
            // SAFETY: the features are those of `isa`.
            dispatch!(isa, sums::<_>(words: &[u32], by: &[u32], out: &mut [f32; LANES]));
            assert_eq!(sum, exact, "{isa:?}");
        }
    }

    #[test]
    fn numbers_are_rounded_to_even() {
        let mut x = [0.0; LANES];
        x[..8].copy_from_slice(&[0.5, 1.5, -0.5, -2.5, 8191.0, -8190.6, 2.4, 32767.0]);
        let x = &x;
        for isa in isas() {
            let mut numbers = [1; LANES];
            let out = &mut numbers;
            // SAFETY: the features are those of `isa`.
            dispatch!(isa, put::<_>(x: &[f32; LANES], out: &mut [i16; LANES]));
            let expected = [0, 2, 0, -2, 8191, -8191, 2, 32767];
            assert_eq!(numbers[..8], expected, "{isa:?}");
            assert_eq!(numbers[8..], [0; 8], "{isa:?}");
        }
    }
}
