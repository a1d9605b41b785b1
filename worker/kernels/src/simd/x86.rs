//! The lanes of AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::{LANES, Lanes};

/// One 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

/// Two 256-bit registers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(crate) __m256, pub(crate) __m256);

/// What the 256-bit conversions to f16 take: three bits.
const TO_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT;
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// SAFETY of every block below: the trait's contract gives the instruction set, and valid
// pointers where there are any.
impl Lanes for Avx512 {
    const REGISTERS: usize = 32;
    #[inline(always)]
    fn prefetch(line: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(self.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        Self(unsafe {
            let n = _mm512_add_epi32(_mm512_cvttps_epi32(self.0), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        })
    }
    #[inline(always)]
    unsafe fn where_ge(self, x: Self, bound: Self) -> Self {
        Self(unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x.0, bound.0);
            _mm512_maskz_mov_ps(keep, self.0)
        })
    }
    #[inline(always)]
    unsafe fn first(self, n: usize) -> Self {
        let keep = ((1u32 << n.min(LANES)) - 1) as __mmask16;
        Self(unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), keep, self.0) })
    }
    #[inline(always)]
    unsafe fn bf16_pairs(p: *const u32) -> (Self, Self) {
        unsafe {
            let w = _mm512_loadu_si512(p.cast());
            let high = _mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(w))),
                Self(_mm512_castsi512_ps(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { self.halves().sum() }
    }
    #[inline(always)]
    unsafe fn maximum(self) -> f32 {
        unsafe { self.halves().maximum() }
    }
}

impl Avx512 {
    #[inline(always)]
    unsafe fn halves(self) -> Avx2 {
        unsafe {
            Avx2(
                _mm512_castps512_ps256(self.0),
                _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0))),
            )
        }
    }
}

impl Avx2 {
    /// Lanes i and i+8, then i+4 combined: four are left.
    #[inline(always)]
    unsafe fn tree(self, f: unsafe fn(__m128, __m128) -> __m128) -> f32 {
        unsafe {
            let low = f(
                _mm256_castps256_ps128(self.0),
                _mm256_castps256_ps128(self.1),
            );
            let high = f(
                _mm256_extractf128_ps::<1>(self.0),
                _mm256_extractf128_ps::<1>(self.1),
            );
            let four = f(low, high);
            let two = f(four, _mm_movehl_ps(four, four));
            let one = f(two, _mm_shuffle_ps::<1>(two, two));
            _mm_cvtss_f32(one)
        }
    }
}

impl Lanes for Avx2 {
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn prefetch(line: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        let v = unsafe { _mm256_set1_ps(x) };
        Self(v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<TO_EVEN>(self.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<TO_EVEN>(self.1));
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { Self(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        unsafe { Self(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        unsafe { Self(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { Self(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        unsafe { Self(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        unsafe {
            Self(
                _mm256_fmadd_ps(self.0, b.0, c.0),
                _mm256_fmadd_ps(self.1, b.1, c.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe {
            Self(
                _mm256_round_ps::<NEAREST>(self.0),
                _mm256_round_ps::<NEAREST>(self.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        #[inline(always)]
        unsafe fn half(x: __m256) -> __m256 {
            unsafe {
                let n = _mm256_add_epi32(_mm256_cvttps_epi32(x), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
            }
        }
        unsafe { Self(half(self.0), half(self.1)) }
    }
    #[inline(always)]
    unsafe fn where_ge(self, x: Self, bound: Self) -> Self {
        unsafe {
            Self(
                _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_GE_OQ>(x.0, bound.0)),
                _mm256_and_ps(self.1, _mm256_cmp_ps::<_CMP_GE_OQ>(x.1, bound.1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn first(self, n: usize) -> Self {
        #[inline(always)]
        unsafe fn half(x: __m256, n: i32) -> __m256 {
            unsafe {
                let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                let keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), index);
                _mm256_blendv_ps(
                    _mm256_set1_ps(f32::NEG_INFINITY),
                    x,
                    _mm256_castsi256_ps(keep),
                )
            }
        }
        let n = n.min(LANES) as i32;
        unsafe { Self(half(self.0, n), half(self.1, n - 8)) }
    }
    #[inline(always)]
    unsafe fn bf16_pairs(p: *const u32) -> (Self, Self) {
        unsafe {
            let a = _mm256_loadu_si256(p.cast());
            let b = _mm256_loadu_si256(p.add(8).cast());
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let low = |w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
            let high = |w| _mm256_castsi256_ps(_mm256_and_si256(w, mask));
            (Self(low(a), low(b)), Self(high(a), high(b)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        #[inline(always)]
        unsafe fn f(x: __m128, y: __m128) -> __m128 {
            unsafe { _mm_add_ps(x, y) }
        }
        unsafe { self.tree(f) }
    }
    #[inline(always)]
    unsafe fn maximum(self) -> f32 {
        #[inline(always)]
        unsafe fn f(x: __m128, y: __m128) -> __m128 {
            unsafe { _mm_max_ps(x, y) }
        }
        unsafe { self.tree(f) }
    }
}
