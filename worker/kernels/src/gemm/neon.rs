//! The dots for 64-bit ARM.

// SAFETY of every block below: the trait's contract gives the instruction set, and valid
// pointers where there are any.

use std::arch::aarch64::*;
use std::array::from_fn;

use super::dot::{Dot, Part};
use crate::quant::QuantBlock;
use crate::simd::{Neon, sdot};

impl Dot for Neon {
    const ROWS: usize = 4;

    /// Register j of group g holds the columns 4g..4g+4 of the rows 4j..4j+4, those of 8 bits
    /// less 128: the instruction takes signed bytes.
    type Quants = [[int8x16_t; 4]; 8];

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> Self {
        Self(from_fn(|j| unsafe {
            vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p.add(8 * j).cast())))
        }))
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self {
        Self(from_fn(|j| unsafe {
            let wide = vmovl_u16(vld1_u16(p.add(8 * j).cast()));
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide))
        }))
    }

    #[inline(always)]
    unsafe fn unpack<const V: usize>(p: *const u8) -> Self::Quants {
        unsafe {
            let (mask, offset) = (vdupq_n_u8(0xf), vdupq_n_u8(0x80));
            let mut w = [[vdupq_n_s8(0); 4]; 8];
            for v in 0..V {
                for j in 0..4 {
                    let x = vld1q_u8(p.add(64 * v + 16 * j));
                    if V == 8 {
                        w[v][j] = vreinterpretq_s8_u8(veorq_u8(x, offset));
                    } else {
                        w[2 * v][j] = vreinterpretq_s8_u8(vandq_u8(x, mask));
                        w[2 * v + 1][j] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(x));
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
            let zero = if V == 8 { zero - 128 } else { zero };
            let mut sums = [vdupq_n_s32(zero * part.neg_sum(act)); 4];
            let (from, to) = part.groups();
            for g in (from..to).step_by(4) {
                let activations = vld1q_s8(act.values.as_ptr().add(4 * g));
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = sdot::<0>(*sum, quants[g][j], activations);
                    *sum = sdot::<1>(*sum, quants[g + 1][j], activations);
                    *sum = sdot::<2>(*sum, quants[g + 2][j], activations);
                    *sum = sdot::<3>(*sum, quants[g + 3][j], activations);
                }
            }
            Self(sums.map(|sum| vcvtq_f32_s32(sum)))
        }
    }
}
