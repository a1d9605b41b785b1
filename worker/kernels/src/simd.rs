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
    /// Vectors of lanes that the registers hold.
    const REGISTERS: usize;
    /// Asks for a line of memory that will be read soon; it need not exist.
    #[inline(always)]
    fn prefetch(_line: *const u8) {}
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// Stores the lanes as f16, rounded to nearest even.
    unsafe fn store_f16(self, p: *mut u16);
    /// The lanes rounded to the nearest [`bf16`].
    #[inline(always)]
    unsafe fn to_bf16(self) -> Self {
        let mut lanes = [0.0; LANES];
        // SAFETY: an array of sixteen elements.
        unsafe {
            self.store(lanes.as_mut_ptr());
            // A closure would be a function without the features, and sixteen scalar roundings.
            for lane in &mut lanes {
                *lane = f32::from_bits(bf16(*lane) << 16);
            }
            Self::load(lanes.as_ptr())
        }
    }
    /// Stores the upper halves of the lanes.
    #[inline(always)]
    unsafe fn store_high(self, p: *mut u16) {
        let (mut lanes, mut halves) = ([0.0; LANES], [0; LANES]);
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (half, lane) in halves.iter_mut().zip(lanes) {
                *half = (lane.to_bits() >> 16) as u16;
            }
            p.cast::<[u16; LANES]>().write_unaligned(halves);
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
    const REGISTERS: usize = 8;
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
mod x86;

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
