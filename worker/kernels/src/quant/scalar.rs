//! The reference quantiser.

use super::{BLOCK, MOST, QuantBlock, scales};

/// Quantises a block.
pub(super) fn block(x: &[f32; BLOCK]) -> QuantBlock {
    let magnitude = x.iter().map(|v| v.abs().to_bits()).max().unwrap_or(0);
    let (scale, inverse) = scales(magnitude, MOST);
    let mut values = [0; BLOCK];
    if inverse != 0.0 {
        for (q, v) in values.iter_mut().zip(x) {
            *q = (v * inverse).round_ties_even() as i8;
        }
    }
    let sum = |q: &[i8]| q.iter().map(|&v| i32::from(v)).sum::<i32>();
    let (low, high) = (sum(&values[..16]), sum(&values[16..]));
    QuantBlock {
        values,
        scale,
        scaled_sum: scale * (low + high) as f32,
        neg_sum: -(low + high),
        neg_low: -low,
    }
}
