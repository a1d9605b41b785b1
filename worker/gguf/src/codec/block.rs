//! What the blocks of all formats are made of.

use half::f16;

/// The f16 at byte `at`, widened.
#[inline]
pub(super) fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Rounds `value` to the f16 at byte `at`; what a reader will find there.
pub(super) fn write_f16(block: &mut [u8], at: usize, value: f32) -> f32 {
    let rounded = f16::from_f32(value);
    block[at..at + 2].copy_from_slice(&rounded.to_le_bytes());
    rounded.to_f32()
}

/// The weight of the largest magnitude, with its sign.
pub(super) fn largest(weights: &[f32]) -> f32 {
    weights
        .iter()
        .fold(0.0, |best: f32, &w| if w.abs() > best.abs() { w } else { best })
}

/// The least and the largest weight.
pub(super) fn range(weights: &[f32]) -> (f32, f32) {
    weights
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &w| {
            (low.min(w), high.max(w))
        })
}

/// `weight / scale + zero`, rounded and kept within `0..=most`. A scale of 0 stands for
/// weights of 0 alone.
pub(super) fn quant(weight: f32, scale: f32, zero: f32, most: f32) -> u8 {
    if scale == 0.0 {
        return zero as u8;
    }
    (weight / scale + zero).round().clamp(0.0, most) as u8
}
