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

    /// A tile is unpacked four columns at a time: beside the sums of four rows there is no room for it.
    #[inline(always)]
    unsafe fn dots<const V: usize, const NARROW: bool, const M: usize>(
        tile: *const u8,
        acts: *const QuantBlock,
        part: Part,
        zero: i32,
    ) -> [Self; M] {
        unsafe {
            // The instruction takes signed bytes: those of 8 bits are less 128.
            let zero = if V == 8 { zero - 128 } else { zero };
            let mut sums = [[vdupq_n_s32(0); 4]; M];
            for (i, sums) in sums.iter_mut().enumerate() {
                *sums = [vdupq_n_s32(zero * part.neg_sum(&*acts.add(i))); 4];
            }
            let (from, to) = part.groups();
            for g in (from..to).step_by(4) {
                let mut columns = [vdupq_n_s8(0); M];
                for (i, columns) in columns.iter_mut().enumerate() {
                    *columns = vld1q_s8((*acts.add(i)).values.as_ptr().add(4 * g));
                }
                add::<0, M>(&mut sums, group::<V>(tile, g), &columns);
                add::<1, M>(&mut sums, group::<V>(tile, g + 1), &columns);
                add::<2, M>(&mut sums, group::<V>(tile, g + 2), &columns);
                add::<3, M>(&mut sums, group::<V>(tile, g + 3), &columns);
            }
            sums.map(|sums| Self(sums.map(|sum| vcvtq_f32_s32(sum))))
        }
    }
}

/// The columns 4g..4g+4 of the rows of a tile, those of 8 bits less 128.
///
/// # Safety
/// The machine has NEON, and the tile is there.
#[inline(always)]
unsafe fn group<const V: usize>(tile: *const u8, g: usize) -> [int8x16_t; 4] {
    unsafe {
        let mut quants = [vdupq_n_s8(0); 4];
        for (j, quants) in quants.iter_mut().enumerate() {
            // A vector has four columns of eight bits, or eight of four.
            let x = |vector| vld1q_u8(tile.add(64 * vector + 16 * j));
            *quants = vreinterpretq_s8_u8(match (V, g % 2) {
                (8, _) => veorq_u8(x(g), vdupq_n_u8(0x80)),
                (_, 0) => vandq_u8(x(g / 2), vdupq_n_u8(0xf)),
                _ => vshrq_n_u8::<4>(x(g / 2)),
            });
        }
        quants
    }
}

/// Adds the products of a group with four columns of each row of activations.
///
/// # Safety
/// The machine has the dot instructions.
#[inline(always)]
unsafe fn add<const LANE: i32, const M: usize>(
    sums: &mut [[int32x4_t; 4]; M],
    quants: [int8x16_t; 4],
    columns: &[int8x16_t; M],
) {
    for (sums, columns) in sums.iter_mut().zip(columns) {
        for (sum, quants) in sums.iter_mut().zip(quants) {
            *sum = unsafe { sdot::<LANE>(*sum, quants, *columns) };
        }
    }
}
