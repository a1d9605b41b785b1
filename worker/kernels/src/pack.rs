//! Weights in the order in which the matrix product reads them.
//!
//! A matrix of N x K is cut into strips of 16 output rows, a strip into tiles of 32 columns.
//! A tile holds the f16 scales of its rows, then their f16 minima where the format has them,
//! then the quants: lane r of each 64-byte vector is row r. 4-bit vectors hold the columns
//! 8g..8g+4 in the low nibbles and 8g+4..8g+8 in the high ones; 8-bit vectors hold the
//! columns 4g..4g+4.

use half::f16;

use crate::pool::{Pool, Scatter};

/// Output rows in a strip.
pub const STRIP: usize = 16;
/// Columns in a tile.
pub const TILE: usize = 32;

/// 32 consecutive weights of a row: `scales[i / 16] * (quants[i] - zero) + min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    /// Unsigned quants.
    pub quants: [u8; TILE],
    /// Scales of the first and the second 16 weights.
    pub scales: [f32; 2],
    /// 0 in the formats with a zero point.
    pub min: f32,
}

/// A matrix to pack.
pub trait RowSource: Sync {
    /// Calls `each` with the index and the contents of every block of `row`, in order.
    fn blocks(&self, row: usize, each: &mut dyn FnMut(usize, &Block));
}

/// How a matrix stores its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4 bits around a zero point, one scale per 32.
    U4Zero(u8),
    /// 4 bits, scale and minimum per 32.
    U4Min,
    /// 8 bits around a zero point, one scale per 32.
    U8Zero(u8),
    /// 8 bits, scale and minimum per 32.
    U8Min,
    /// 8 bits around a zero point, one scale per 16.
    U8Halves(u8),
}

impl Format {
    /// 64-byte vectors of quants in a tile.
    pub(crate) const fn vectors(self) -> usize {
        match self {
            Self::U4Zero(_) | Self::U4Min => 4,
            _ => 8,
        }
    }

    /// f16 vectors of 16 before the quants.
    const fn heads(self) -> usize {
        match self {
            Self::U4Zero(_) | Self::U8Zero(_) => 1,
            _ => 2,
        }
    }

    /// Bytes before the quants.
    pub(crate) const fn head_bytes(self) -> usize {
        self.heads() * 2 * STRIP
    }

    /// Bytes of a tile.
    pub const fn tile_bytes(self) -> usize {
        self.head_bytes() + self.vectors() * 64
    }

    /// The quant that stands for 0.
    pub(crate) const fn zero(self) -> u8 {
        match self {
            Self::U4Zero(z) | Self::U8Zero(z) | Self::U8Halves(z) => z,
            _ => 0,
        }
    }
}

/// A shape that can't be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{n} x {k}: rows must be a multiple of 16 and columns of 32")]
pub struct ShapeError {
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
}

/// The shape and the format of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) format: Format,
}

impl Layout {
    /// For `n` output rows of `k` weights.
    pub fn new(n: usize, k: usize, format: Format) -> Result<Self, ShapeError> {
        if n == 0 || k == 0 || !n.is_multiple_of(STRIP) || !k.is_multiple_of(TILE) {
            return Err(ShapeError { n, k });
        }
        Ok(Self { n, k, format })
    }

    /// Output rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes of a strip.
    pub(crate) fn strip_bytes(&self) -> usize {
        self.k / TILE * self.format.tile_bytes()
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.n / STRIP * self.strip_bytes()
    }

    /// Packs `source` into `out`, strips shared among the threads of `pool`.
    ///
    /// # Panics
    /// When `out` is not of [`bytes`](Self::bytes), or the source's rows are not of `k` weights.
    pub fn pack(&self, pool: &mut Pool, source: &dyn RowSource, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes());
        let bytes = self.strip_bytes();
        let out = Scatter::new(out);
        pool.phase(self.n / STRIP, |strip| {
            // SAFETY: every item has its own strip.
            let out = unsafe { out.part(strip * bytes, bytes) };
            for lane in 0..STRIP {
                source.blocks(strip * STRIP + lane, &mut |tile, block| {
                    let at = tile * self.format.tile_bytes();
                    self.put(&mut out[at..at + self.format.tile_bytes()], lane, block);
                });
            }
        });
    }

    fn put(&self, tile: &mut [u8], lane: usize, block: &Block) {
        let (head, quants) = tile.split_at_mut(self.format.head_bytes());
        let mut half = |index: usize, x: f32| {
            let at = 2 * (index * STRIP + lane);
            head[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
        };
        half(0, block.scales[0]);
        match self.format {
            Format::U4Min | Format::U8Min => half(1, block.min),
            Format::U8Halves(_) => half(1, block.scales[1]),
            _ => {}
        }
        let step = TILE / self.format.vectors();
        for (vector, q) in quants
            .chunks_exact_mut(64)
            .zip(block.quants.chunks_exact(step))
        {
            let lane = &mut vector[4 * lane..4 * lane + 4];
            if step == 4 {
                lane.copy_from_slice(q);
            } else {
                for (byte, (low, high)) in lane.iter_mut().zip(q[..4].iter().zip(&q[4..])) {
                    *byte = low | high << 4;
                }
            }
        }
    }

    /// Turns row `row` of the packed `data` back into floats.
    ///
    /// # Panics
    /// When `row` is not of the matrix, or a length is not its own.
    pub fn unpack_row(&self, data: &[u8], row: usize, out: &mut [f32]) {
        assert!(row < self.n && data.len() == self.bytes() && out.len() == self.k);
        let (strip, lane) = (row / STRIP, row % STRIP);
        let strip = &data[strip * self.strip_bytes()..][..self.strip_bytes()];
        let zero = f32::from(self.format.zero());
        let tiles = strip.chunks_exact(self.format.tile_bytes());
        for (tile, out) in tiles.zip(out.chunks_exact_mut(TILE)) {
            let (head, quants) = tile.split_at(self.format.head_bytes());
            let half = |index: usize| {
                let at = 2 * (index * STRIP + lane);
                f16::from_le_bytes([head[at], head[at + 1]]).to_f32()
            };
            let (first, min) = match self.format {
                Format::U4Min | Format::U8Min => (half(0), half(1)),
                _ => (half(0), 0.0),
            };
            let second = match self.format {
                Format::U8Halves(_) => half(1),
                _ => first,
            };
            let step = TILE / self.format.vectors();
            for (vector, out) in quants.chunks_exact(64).zip(out.chunks_exact_mut(step)) {
                let lane = &vector[4 * lane..4 * lane + 4];
                for (i, out) in out.iter_mut().enumerate() {
                    let byte = lane[i % 4];
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
    }
}
