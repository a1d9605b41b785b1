//! Sixteen rows, turned into the tiles of a strip.

use half::bf16;

use super::{Block, Format, Layout, STRIP, Source, TILE};
use crate::Isa;
use crate::simd::{Lanes, dispatch};

/// What rounds to an infinite f16.
const F16_END: f32 = 65520.0;

/// Room for the rows of a strip.
#[derive(Clone)]
pub(super) struct StripRows {
    blocks: Vec<Block>,
    floats: Vec<f32>,
}

impl StripRows {
    /// Room for a strip of so many blocks or floats.
    pub(super) fn new(blocks: usize, floats: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks],
            floats: vec![0.0; floats],
        }
    }

    /// Fills `out`, a strip; the error is the first lane with weights that the format can't hold.
    pub(super) fn pack(
        &mut self,
        isa: Isa,
        layout: &Layout,
        source: Source<'_>,
        strip: usize,
        out: &mut [u8],
    ) -> Result<(), usize> {
        let Layout { n, k, format, .. } = *layout;
        let first = strip * STRIP;
        let lanes = STRIP.min(n - first);
        match source {
            Source::Blocks(source) => {
                let width = k / TILE;
                let (blocks, rest) = self.blocks[..STRIP * width].split_at_mut(lanes * width);
                rest.fill(Block::default());
                for (lane, row) in blocks.chunks_exact_mut(width).enumerate() {
                    source.blocks(first + lane, row);
                    if !row.iter().all(fits) {
                        return Err(lane);
                    }
                }
                let blocks = &self.blocks[..STRIP * width];
                dispatch!(isa, tiles::<_>(format: Format, blocks: &[Block], out: &mut [u8]));
            }
            Source::Floats(source) => {
                let (floats, rest) = self.floats[..STRIP * k].split_at_mut(lanes * k);
                rest.fill(0.0);
                let end = if format == Format::F16 {
                    F16_END
                } else {
                    f32::INFINITY
                };
                for (lane, row) in floats.chunks_exact_mut(k).enumerate() {
                    source.floats(first + lane, row);
                    if !row.iter().all(|x| x.abs() < end) {
                        return Err(lane);
                    }
                }
                let floats = &self.floats[..STRIP * k];
                dispatch!(isa, columns::<_>(format: Format, floats: &[f32], out: &mut [u8]));
            }
        }
        Ok(())
    }
}

/// Whether f16 holds the scales and the minimum.
fn fits(block: &Block) -> bool {
    let [low, high] = block.scales;
    [low, high, block.min].iter().all(|x| x.abs() < F16_END)
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn tiles<L: Lanes>(format: Format, blocks: &[Block], out: &mut [u8]) {
    let width = blocks.len() / STRIP;
    for (i, tile) in out.chunks_exact_mut(format.tile_bytes()).enumerate() {
        let rows: [&Block; STRIP] = std::array::from_fn(|lane| &blocks[lane * width + i]);
        let (head, quants) = tile.split_at_mut(format.head_bytes());
        let mut heads = head.chunks_exact_mut(2 * STRIP);
        let mut put = |values: [f32; STRIP]| {
            if let Some(head) = heads.next() {
                // SAFETY: the contract of this function; `head` holds sixteen f16.
                unsafe { L::load(values.as_ptr()).store_f16(head.as_mut_ptr().cast()) };
            }
        };
        put(rows.map(|block| block.scales[0]));
        match format {
            Format::U4Min | Format::U8Min => put(rows.map(|block| block.min)),
            Format::U8Halves(_) => put(rows.map(|block| block.scales[1])),
            _ => {}
        }
        for (lane, block) in rows.into_iter().enumerate() {
            let vectors = quants.chunks_exact_mut(64);
            if format.vectors() == 4 {
                debug_assert!(block.quants.iter().all(|&q| q < 16), "more than four bits");
                for (vector, q) in vectors.zip(block.quants.as_chunks::<8>().0) {
                    // The bytes 4..8 move into the high nibbles of the bytes 0..4.
                    let q = u64::from_le_bytes(*q);
                    let packed = (q | q >> 28) as u32;
                    vector[4 * lane..4 * lane + 4].copy_from_slice(&packed.to_le_bytes());
                }
            } else {
                let q = block.quants.map(|q| q.wrapping_add(format.shift()));
                for (vector, q) in vectors.zip(q.as_chunks::<4>().0) {
                    vector[4 * lane..4 * lane + 4].copy_from_slice(q);
                }
            }
        }
    }
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn columns<L: Lanes>(format: Format, floats: &[f32], out: &mut [u8]) {
    let k = floats.len() / STRIP;
    for (i, tile) in out.chunks_exact_mut(format.tile_bytes()).enumerate() {
        let x: [f32; STRIP] = std::array::from_fn(|lane| floats[lane * k + i]);
        match format {
            // SAFETY: the contract of this function; a tile holds sixteen f16.
            Format::F16 => unsafe { L::load(x.as_ptr()).store_f16(tile.as_mut_ptr().cast()) },
            Format::Bf16 => {
                for (out, x) in tile.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                    *out = bf16::from_f32(x).to_le_bytes();
                }
            }
            _ => {
                for (out, x) in tile.as_chunks_mut::<4>().0.iter_mut().zip(x) {
                    *out = x.to_le_bytes();
                }
            }
        }
    }
}
