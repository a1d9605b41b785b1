//! One row of one tile: written when a matrix is packed, read when a row is unpacked.

use half::{bf16, f16};

use super::{Block, Format, STRIP, TILE};

fn put_half(head: &mut [u8], index: usize, x: f32) -> bool {
    let half = f16::from_f32(x);
    head[2 * index..2 * index + 2].copy_from_slice(&half.to_le_bytes());
    half.is_finite()
}

fn half(head: &[u8], index: usize) -> f32 {
    f16::from_le_bytes([head[2 * index], head[2 * index + 1]]).to_f32()
}

/// Writes `block` as row `lane`; false if f16 can't hold its scales or its minimum.
pub(super) fn put_block(format: Format, tile: &mut [u8], lane: usize, block: &Block) -> bool {
    let (head, quants) = tile.split_at_mut(format.head_bytes());
    let mut finite = put_half(head, lane, block.scales[0]);
    finite &= match format {
        Format::U4Min | Format::U8Min => put_half(head, STRIP + lane, block.min),
        Format::U8Halves(_) => put_half(head, STRIP + lane, block.scales[1]),
        _ => true,
    };
    let q = block.quants.map(|q| q.wrapping_add(format.shift()));
    if format.vectors() == 4 {
        debug_assert!(q.iter().all(|&q| q < 16), "a quant of more than four bits");
        for (vector, q) in quants.chunks_exact_mut(64).zip(q.as_chunks::<8>().0) {
            // The bytes 4..8 move into the high nibbles of the bytes 0..4.
            let q = u64::from_le_bytes(*q);
            let packed = (q | q >> 28) as u32;
            vector[4 * lane..4 * lane + 4].copy_from_slice(&packed.to_le_bytes());
        }
    } else {
        for (vector, q) in quants.chunks_exact_mut(64).zip(q.as_chunks::<4>().0) {
            vector[4 * lane..4 * lane + 4].copy_from_slice(q);
        }
    }
    finite
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

/// Writes `x` as row `lane` of a tile of floats; false if it is not finite there.
pub(super) fn put_float(format: Format, tile: &mut [u8], lane: usize, x: f32) -> bool {
    match format {
        Format::F16 => put_half(tile, lane, x),
        Format::Bf16 => {
            let x = bf16::from_f32(x);
            tile[2 * lane..2 * lane + 2].copy_from_slice(&x.to_le_bytes());
            x.is_finite()
        }
        _ => {
            tile[4 * lane..4 * lane + 4].copy_from_slice(&x.to_le_bytes());
            x.is_finite()
        }
    }
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
