//! One row of one tile, read back.

use half::{bf16, f16};

use super::{Format, STRIP, TILE};

fn half(head: &[u8], index: usize) -> f32 {
    f16::from_le_bytes([head[2 * index], head[2 * index + 1]]).to_f32()
}

/// Reads row `lane` of a tile of quants.
pub(super) fn block(format: Format, tile: &[u8], lane: usize, out: &mut [f32]) {
    let (head, quants) = tile.split_at(format.head_bytes());
    let first = half(head, lane);
    let (second, min) = match format {
        Format::U4Min | Format::U8Min => (first, half(head, STRIP + lane)),
        Format::U8Halves(_) => (half(head, STRIP + lane), 0.0),
        _ => (first, 0.0),
    };
    let zero = f32::from(format.stored_zero());
    let step = TILE / format.vectors();
    for (vector, out) in quants.chunks_exact(64).zip(out.chunks_exact_mut(step)) {
        let bytes = &vector[4 * lane..4 * lane + 4];
        for (i, out) in out.iter_mut().enumerate() {
            let byte = bytes[i % 4];
            let q = match (step, i / 4) {
                (4, _) => byte,
                (_, 0) => byte & 0xf,
                _ => byte >> 4,
            };
            *out = f32::from(q) - zero;
        }
    }
    let (low, high) = out.split_at_mut(TILE / 2);
    low.iter_mut().for_each(|x| *x = *x * first + min);
    high.iter_mut().for_each(|x| *x = *x * second + min);
}

/// Reads row `lane` of a tile of floats.
pub(super) fn float(format: Format, tile: &[u8], lane: usize) -> f32 {
    match format {
        Format::F16 => half(tile, lane),
        Format::Bf16 => bf16::from_le_bytes([tile[2 * lane], tile[2 * lane + 1]]).to_f32(),
        _ => {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| tile[4 * lane + i]);
            f32::from_le_bytes([a, b, c, d])
        }
    }
}
