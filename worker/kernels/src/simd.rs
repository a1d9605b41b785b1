//! Sixteen f32 lanes, written once for every instruction set.
//!
//! A kernel that is generic over [`Lanes`] gives the same bits on all of them, because each
//! operation here is one correctly rounded IEEE operation per lane (a fused multiply-add is
//! one rounding everywhere) and the only reductions, [`Lanes::sum`] and [`Lanes::maximum`],
//! have one fixed tree.
//!
//! The methods are `inline(always)` bodies of target-feature intrinsics. They must be
//! reached from a function that enables the features of the implementation, which is what
//! [`dispatch!`] writes.

use crate::bf16::bf16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 lanes.
///
/// # Safety
/// Every method needs the instruction set of the implementation. Pointers are unaligned and
/// must be valid for the sixteen elements they stand for.
pub(crate) trait Lanes: Copy {
    /// Asks for a line of memory that will be read soon; it need not exist.
    #[inline(always)]
    fn prefetch(_line: *const u8) {}
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// Stores the lanes as f16, rounded to nearest even.
    unsafe fn store_f16(self, p: *mut u16);
    /// Stores the lanes as bf16, rounded to nearest even, those below [`bf16`]'s least as zeros.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        let mut lanes = [0.0; LANES];
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            self.store(lanes.as_mut_ptr());
            p.cast::<[u16; LANES]>()
                .write_unaligned(lanes.map(|x| bf16(x) as u16));
        }
    }
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// The greater lane; `b` where either is NaN or both are zero.
    unsafe fn max(self, b: Self) -> Self;
    /// The lesser lane; `b` where either is NaN or both are zero.
    unsafe fn min(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` for integral lanes in [-126, 127].
    unsafe fn exp2i(self) -> Self;
    /// `self` where `x >= bound`, 0 elsewhere.
    unsafe fn where_ge(self, x: Self, bound: Self) -> Self;
    /// The first `n` lanes; `-inf` in the others.
    unsafe fn first(self, n: usize) -> Self;
    /// Sixteen pairs of bf16, each pair one little-endian u32: the lows and the highs.
    unsafe fn bf16_pairs(p: *const u32) -> (Self, Self);
    /// Sixteen int8.
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            let lanes = p.cast::<[i8; LANES]>().read_unaligned().map(f32::from);
            Self::load(lanes.as_ptr())
        }
    }
    /// The sum of the lanes: lane i and i+8, then i+4, i+2, i+1.
    unsafe fn sum(self) -> f32;
    /// The greatest lane.
    unsafe fn maximum(self) -> f32;
}

/// The reference: an array.
#[derive(Clone, Copy)]
pub(crate) struct Scalar(pub(crate) [f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }

    #[inline(always)]
    fn tree(mut self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut n = LANES;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                self.0[i] = f(self.0[i], self.0[i + n]);
            }
        }
        self.0[0]
    }
}

impl Lanes for Scalar {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        Self(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        let halves = self.0.map(|x| half::f16::from_f32(x).to_bits());
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(halves) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        Self(
            self.0
                .map(|x| f32::from_bits(((x as i32 + 127) as u32) << 23)),
        )
    }
    #[inline(always)]
    unsafe fn where_ge(self, x: Self, bound: Self) -> Self {
        Self(std::array::from_fn(|i| {
            if x.0[i] >= bound.0[i] { self.0[i] } else { 0.0 }
        }))
    }
    #[inline(always)]
    unsafe fn first(self, n: usize) -> Self {
        Self(std::array::from_fn(|i| {
            if i < n { self.0[i] } else { f32::NEG_INFINITY }
        }))
    }
    #[inline(always)]
    unsafe fn bf16_pairs(p: *const u32) -> (Self, Self) {
        // SAFETY: the caller vouches for sixteen elements.
        let pairs = unsafe { p.cast::<[u32; LANES]>().read_unaligned() };
        (
            Self(pairs.map(|w| f32::from_bits(w << 16))),
            Self(pairs.map(|w| f32::from_bits(w & 0xffff_0000))),
        )
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.tree(|x, y| x + y)
    }
    #[inline(always)]
    unsafe fn maximum(self) -> f32 {
        self.tree(|x, y| if x > y { x } else { y })
    }
}

#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::{Neon, sdot};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Lanes};
    use std::arch::x86_64::*;

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
        unsafe fn load_i8(p: *const i8) -> Self {
            unsafe {
                let lanes = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
                Self(_mm512_cvtepi32_ps(lanes))
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
        unsafe fn load_i8(p: *const i8) -> Self {
            #[inline(always)]
            unsafe fn half(p: *const i8) -> __m256 {
                unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
            }
            unsafe { Self(half(p), half(p.add(8))) }
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
}

/// Calls the generic kernel `$kernel::<L>(args…)` with the lanes of `$isa`, inside a function
/// that enables their features.
macro_rules! dispatch {
    ($isa:expr, $kernel:ident::<_ $(, $c:tt)*>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,f16c")]
        unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the features are enabled here; the rest is the caller's contract.
            unsafe { $kernel::<$crate::simd::Avx512 $(, $c)*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "fma,avx2,f16c")]
        unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the features are enabled here; the rest is the caller's contract.
            unsafe { $kernel::<$crate::simd::Avx2 $(, $c)*>($($arg),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon,dotprod")]
        unsafe fn neon($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the features are enabled here; the rest is the caller's contract.
            unsafe { $kernel::<$crate::simd::Neon $(, $c)*>($($arg),*) }
        }
        match $isa.checked() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `checked` found the features.
            $crate::Isa::Avx512 | $crate::Isa::Avx512Bf16 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::Isa::Avx2 => unsafe { avx2($($arg),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            $crate::Isa::Neon => unsafe { neon($($arg),*) },
            // SAFETY: the scalar lanes need no features; the rest is the caller's contract.
            _ => unsafe { $kernel::<$crate::simd::Scalar $(, $c)*>($($arg),*) },
        }
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests;
