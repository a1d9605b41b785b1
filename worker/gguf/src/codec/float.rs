//! Plain floats.

use half::{bf16, f16};

use crate::GgmlType;

/// Widens the weights of a plain type.
pub(super) fn decode(ty: GgmlType, data: &[u8], out: &mut [f32]) {
    match ty {
        GgmlType::F16 => read(data, out, |b| f16::from_le_bytes(b).to_f32()),
        GgmlType::BF16 => read(data, out, |b| bf16::from_le_bytes(b).to_f32()),
        _ => read(data, out, f32::from_le_bytes),
    }
}

/// Rounds weights to a plain type.
pub(super) fn encode(ty: GgmlType, weights: &[f32], data: &mut [u8]) {
    match ty {
        GgmlType::F16 => write(weights, data, |w| f16::from_f32(w).to_le_bytes()),
        GgmlType::BF16 => write(weights, data, |w| bf16::from_f32(w).to_le_bytes()),
        _ => write(weights, data, f32::to_le_bytes),
    }
}

fn read<const N: usize>(data: &[u8], out: &mut [f32], widen: impl Fn([u8; N]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(data.as_chunks::<N>().0) {
        *out = widen(bytes);
    }
}

fn write<const N: usize>(weights: &[f32], data: &mut [u8], narrow: impl Fn(f32) -> [u8; N]) {
    for (&weight, bytes) in weights.iter().zip(data.as_chunks_mut::<N>().0) {
        *bytes = narrow(weight);
    }
}
