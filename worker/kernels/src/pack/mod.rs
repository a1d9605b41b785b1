//! Weights in the order in which the matrix product reads them.
//!
//! A matrix of N x K is cut into strips of 16 output rows, a strip into tiles of 32 columns.
//! A tile holds the f16 scales of its rows, then their f16 minima where the format has them,
//! then the quants: lane r of each 64-byte vector is row r. 4-bit vectors hold the columns
//! 8g..8g+4 in the low nibbles and 8g+4..8g+8 in the high ones; 8-bit vectors hold the
//! columns 4g..4g+4. Tiles of floats are one column. The last strip is filled up with zeros.

mod format;
mod tile;

use std::sync::atomic::{AtomicUsize, Ordering};

pub use format::Format;

use crate::pool::{Pool, Scatter};

/// Output rows in a strip.
pub const STRIP: usize = 16;
/// Columns in a tile of quants.
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

/// Quantised weights to pack.
pub trait RowSource: Sync {
    /// Calls `each` with the index and the contents of every block of `row`, in order.
    fn blocks(&self, row: usize, each: &mut dyn FnMut(usize, &Block));
}

/// Why a matrix can't be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// The shape has no room in the format.
    #[error("{n} x {k} weights cannot be stored as {format:?}: columns come in tiles of {}", format.tile_columns())]
    Shape {
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
        /// The format.
        format: Format,
    },
    /// A scale, a minimum or a float is not finite in the format.
    #[error("row {row} has weights that {format:?} cannot hold")]
    NotFinite {
        /// The least such row.
        row: usize,
        /// The format.
        format: Format,
    },
}

impl PackError {
    /// What can be done about it.
    pub fn class(&self) -> shoal_core::Class {
        shoal_core::Class::Fatal
    }
}

/// The shape and the format of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    n: usize,
    k: usize,
    format: Format,
    bytes: usize,
}

impl Layout {
    /// For `n` output rows of `k` weights. Quants come in whole tiles of 32 columns.
    pub fn new(n: usize, k: usize, format: Format) -> Result<Self, PackError> {
        let error = PackError::Shape { n, k, format };
        if n == 0 || k == 0 || !k.is_multiple_of(format.tile_columns()) {
            return Err(error);
        }
        let strip = (k / format.tile_columns()).checked_mul(format.tile_bytes());
        let bytes = strip.and_then(|strip| strip.checked_mul(n.div_ceil(STRIP)));
        let bytes = bytes.ok_or(error)?;
        Ok(Self {
            n,
            k,
            format,
            bytes,
        })
    }

    /// Output rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Strips of 16 rows.
    pub(crate) fn strips(&self) -> usize {
        self.n.div_ceil(STRIP)
    }

    /// Bytes of a strip.
    pub(crate) fn strip_bytes(&self) -> usize {
        self.bytes / self.strips()
    }

    /// Packs quantised weights into `out`, strips shared among the threads of `pool`.
    ///
    /// # Errors
    /// [`PackError::NotFinite`] when f16 can't hold a scale or a minimum.
    ///
    /// # Panics
    /// When `out` is not of [`bytes`](Self::bytes), the source's rows are not of `k` weights,
    /// or the format is one of floats.
    pub fn pack(
        &self,
        pool: &mut Pool,
        source: &dyn RowSource,
        out: &mut [u8],
    ) -> Result<(), PackError> {
        let format = self.format;
        assert!(!format.is_float());
        self.each_row(pool, out, |row, strip| {
            let mut finite = true;
            source.blocks(row, &mut |tile, block| {
                let at = tile * format.tile_bytes();
                let tile = &mut strip[at..at + format.tile_bytes()];
                finite &= tile::put_block(format, tile, row % STRIP, block);
            });
            finite
        })
    }

    /// Packs floats into `out`, strips shared among the threads of `pool`: `read` fills a
    /// slice of `k` weights with those of a row. They are rounded to the format.
    ///
    /// # Errors
    /// [`PackError::NotFinite`] when the format can't hold a weight.
    ///
    /// # Panics
    /// When `out` is not of [`bytes`](Self::bytes), or the format is not one of floats.
    pub fn pack_floats(
        &self,
        pool: &mut Pool,
        read: impl Fn(usize, &mut [f32]) + Sync,
        out: &mut [u8],
    ) -> Result<(), PackError> {
        let format = self.format;
        assert!(format.is_float());
        self.each_row(pool, out, |row, strip| {
            let mut x = vec![0.0; self.k];
            read(row, &mut x);
            let tiles = strip.chunks_exact_mut(format.tile_bytes());
            tiles.zip(x).fold(true, |finite, (tile, x)| {
                tile::put_float(format, tile, row % STRIP, x) & finite
            })
        })
    }

    /// Calls `put` with every row and its strip; it says whether all of the row was finite.
    fn each_row(
        &self,
        pool: &mut Pool,
        out: &mut [u8],
        put: impl Fn(usize, &mut [u8]) -> bool + Sync,
    ) -> Result<(), PackError> {
        assert_eq!(out.len(), self.bytes);
        let (bytes, format) = (self.strip_bytes(), self.format);
        let worst = AtomicUsize::new(usize::MAX);
        let out = Scatter::new(out);
        pool.phase(self.strips(), |strip| {
            // SAFETY: every item has its own strip.
            let out = unsafe { out.part(strip * bytes, bytes) };
            if self.n < (strip + 1) * STRIP {
                out.fill(0);
            }
            for row in strip * STRIP..self.n.min((strip + 1) * STRIP) {
                if !put(row, out) {
                    worst.fetch_min(row, Ordering::Relaxed);
                }
            }
        });
        match worst.into_inner() {
            usize::MAX => Ok(()),
            row => Err(PackError::NotFinite { row, format }),
        }
    }

    /// Turns row `row` of the packed `data` back into floats.
    ///
    /// # Panics
    /// When `row` is not of the matrix, or a length is not its own.
    pub fn unpack_row(&self, data: &[u8], row: usize, out: &mut [f32]) {
        assert!(row < self.n && data.len() == self.bytes && out.len() == self.k);
        let (strip, lane) = (row / STRIP, row % STRIP);
        let strip = &data[strip * self.strip_bytes()..][..self.strip_bytes()];
        let tiles = strip.chunks_exact(self.format.tile_bytes());
        let columns = self.format.tile_columns();
        for (tile, out) in tiles.zip(out.chunks_exact_mut(columns)) {
            if self.format.is_float() {
                out[0] = tile::float(self.format, tile, lane);
            } else {
                tile::block(self.format, tile, lane, out);
            }
        }
    }
}
