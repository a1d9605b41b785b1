//! The quantiser for 64-bit ARM. As in the others the only reductions are a maximum and integer
//! sums: exact in every order.

use std::arch::aarch64::*;

use super::{BLOCK, GROUP, MOST, QuantBlock, scales};

/// Quantises blocks of a row into `out` and every [`GROUP`]th place after it.
///
/// # Safety
/// The places are there, and nobody else reads or writes them.
#[target_feature(enable = "neon")]
pub(super) unsafe fn blocks(x: &[[f32; BLOCK]], out: *mut QuantBlock) {
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the contract of this function.
        block(x, unsafe { &mut *out.add(i * GROUP) });
    }
}

/// Quantises a block.
#[target_feature(enable = "neon")]
#[inline]
fn block(x: &[f32; BLOCK], out: &mut QuantBlock) {
    // SAFETY: `x` holds eight vectors.
    let v: [float32x4_t; 8] = std::array::from_fn(|i| unsafe { vld1q_f32(x.as_ptr().add(4 * i)) });
    let mut max = vdupq_n_u32(0);
    for v in v {
        max = vmaxq_u32(max, vreinterpretq_u32_f32(vabsq_f32(v)));
    }
    let (scale, inverse) = scales(vmaxvq_u32(max), MOST);
    let (mut low, mut high) = (0, 0);
    if inverse == 0.0 {
        out.values = [0; BLOCK];
    } else {
        let q = |i: usize| vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse)));
        let words = |i: usize| vqmovn_s16(vcombine_s16(q(i), q(i + 1)));
        let bytes = [0, 4].map(|i| vcombine_s8(words(i), words(i + 2)));
        // SAFETY: `values` holds two vectors of sixteen bytes.
        unsafe {
            vst1q_s8(out.values.as_mut_ptr(), bytes[0]);
            vst1q_s8(out.values.as_mut_ptr().add(16), bytes[1]);
        }
        (low, high) = (
            i32::from(vaddlvq_s8(bytes[0])),
            i32::from(vaddlvq_s8(bytes[1])),
        );
    }
    out.scale = scale;
    out.scaled_sum = scale * (low + high) as f32;
    out.neg_sum = -(low + high);
    out.neg_low = -low;
}
