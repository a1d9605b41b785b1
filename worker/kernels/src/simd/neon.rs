//! The lanes of NEON, whose fused multiply-add and conversions every 64-bit ARM has.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

use super::{LANES, Lanes};

/// Four 128-bit registers: lane 4j+i is lane i of register j.
#[derive(Clone, Copy)]
pub(crate) struct Neon(pub(crate) [float32x4_t; 4]);

/// Adds to each lane of `sum` the dot of its four bytes of `a` with the word `WORD` of `b`: an
/// instruction whose intrinsic is not stable yet.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(crate) fn sdot<const WORD: i32>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is of the features of this function; it reads and writes registers.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{word}]",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, word = const WORD,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

// SAFETY of every block below: the trait's contract gives the instruction set, and valid
// pointers where there are any.
impl Neon {
    #[inline(always)]
    fn map(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        Self(from_fn(|j| f(self.0[j])))
    }

    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(from_fn(|j| f(self.0[j], b.0[j])))
    }

    #[inline(always)]
    unsafe fn tree(self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> f32 {
        let [a, b, c, d] = self.0;
        let four = f(f(a, c), f(b, d));
        unsafe {
            let two = f(four, vextq_f32::<2>(four, four));
            let one = f(two, vdupq_laneq_f32::<1>(two));
            vgetq_lane_f32::<0>(one)
        }
    }
}

impl Lanes for Neon {
    const REGISTERS: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([unsafe { vdupq_n_f32(x) }; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(from_fn(|j| unsafe { vld1q_f32(p.add(4 * j)) }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for (j, x) in self.0.into_iter().enumerate() {
            unsafe { vst1q_f32(p.add(4 * j), x) };
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        for (j, x) in self.0.into_iter().enumerate() {
            unsafe { vst1_u16(p.add(4 * j), vreinterpret_u16_f16(vcvt_f16_f32(x))) };
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| unsafe { vaddq_f32(x, y) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| unsafe { vsubq_f32(x, y) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| unsafe { vmulq_f32(x, y) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |x, y| unsafe { vdivq_f32(x, y) })
    }
    // The instructions for maxima and minima treat NaN and zeros in their own way.
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| unsafe { vbslq_f32(vcgtq_f32(x, y), x, y) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| unsafe { vbslq_f32(vcltq_f32(x, y), x, y) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(from_fn(|j| unsafe { vfmaq_f32(c.0[j], self.0[j], b.0[j]) }))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        self.map(|x| unsafe { vrndnq_f32(x) })
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        self.map(|x| unsafe {
            let n = vaddq_s32(vcvtq_s32_f32(x), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
        })
    }
    #[inline(always)]
    unsafe fn where_ge(self, x: Self, bound: Self) -> Self {
        Self(from_fn(|j| unsafe {
            let keep = vcgeq_f32(x.0[j], bound.0[j]);
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(self.0[j]), keep))
        }))
    }
    #[inline(always)]
    unsafe fn first(self, n: usize) -> Self {
        let n = n.min(LANES) as i32;
        Self(from_fn(|j| unsafe {
            let index = vld1q_s32([0, 1, 2, 3].as_ptr());
            let keep = vcltq_s32(index, vdupq_n_s32(n - 4 * j as i32));
            vbslq_f32(keep, self.0[j], vdupq_n_f32(f32::NEG_INFINITY))
        }))
    }
    #[inline(always)]
    unsafe fn bf16_pairs(p: *const u32) -> (Self, Self) {
        let pairs: [uint32x4_t; 4] = from_fn(|j| unsafe { vld1q_u32(p.add(4 * j)) });
        (
            Self(pairs.map(|w| unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(w)) })),
            Self(
                pairs.map(|w| unsafe {
                    vreinterpretq_f32_u32(vandq_u32(w, vdupq_n_u32(0xffff_0000)))
                }),
            ),
        )
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { self.tree(|x, y| vaddq_f32(x, y)) }
    }
    #[inline(always)]
    unsafe fn maximum(self) -> f32 {
        unsafe { self.tree(|x, y| vbslq_f32(vcgtq_f32(x, y), x, y)) }
    }
}
