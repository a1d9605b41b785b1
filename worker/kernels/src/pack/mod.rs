//! Weights in the order in which the matrix product reads them.
//!
//! A matrix of N x K is cut into strips of 16 output rows, a strip into tiles of 32 columns.
//! A tile holds the f16 scales of its rows, then their f16 minima where the format has them,
//! then the quants: lane r of each 64-byte vector is row r. 4-bit vectors hold the columns
//! 8g..8g+4 in the low nibbles and 8g+4..8g+8 in the high ones; 8-bit vectors hold the
//! columns 4g..4g+4. Tiles of floats are one column. The last strip is filled up with zeros.

mod format;
mod strip;
mod tile;

use std::sync::atomic::{AtomicUsize, Ordering};

pub use format::Format;
use strip::StripRows;

use crate::pool::Scatter;
use crate::team::Team;

/// Output rows in a strip.
pub(crate) const STRIP: usize = 16;
/// Columns in a tile of quants.
pub const TILE: usize = 32;

/// 32 consecutive weights of a row: `scales[i / 16] * (quants[i] - zero) + min`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Block {
    /// Unsigned quants.
    pub quants: [u8; TILE],
    /// Scales of the first and the second 16 weights.
    pub scales: [f32; 2],
    /// 0 in the formats with a zero point.
    pub min: f32,
}

/// Quantised weights to pack.
pub trait BlockRows: Sync {
    /// Fills `out` with the blocks of a row.
    fn blocks(&self, row: usize, out: &mut [Block]);
}

/// Floats to pack.
pub trait FloatRows: Sync {
    /// Fills `out` with the weights of a row.
    fn floats(&self, row: usize, out: &mut [f32]);
}

/// The weights of a matrix; which variant, its format says.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// For the formats of quants.
    Blocks(&'a dyn BlockRows),
    /// For the formats of floats, to which they are rounded.
    Floats(&'a dyn FloatRows),
}

/// A matrix to pack.
pub struct Packing<'a> {
    /// Its shape and format.
    pub layout: Layout,
    /// Its weights.
    pub source: Source<'a>,
    /// Where they go, [`Layout::bytes`].
    pub out: &'a mut [u8],
}

/// The shape has no room in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{n} x {k} weights cannot be stored as {format:?}: columns come in tiles of {}", format.tile_columns())]
pub struct ShapeError {
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// The format.
    pub format: Format,
}

/// A scale, a minimum or a float is not finite in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("row {row} has weights that {format:?} cannot hold")]
pub struct NotFinite {
    /// The first such matrix.
    pub matrix: usize,
    /// Its first such row.
    pub row: usize,
    /// Its format.
    pub format: Format,
}

impl ShapeError {
    /// What can be done about it.
    pub fn class(&self) -> shoal_core::Class {
        shoal_core::Class::Fatal
    }
}

impl NotFinite {
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
    ///
    /// # Errors
    /// When there are none, they fill no whole tiles, or are more than memory can hold.
    pub fn new(n: usize, k: usize, format: Format) -> Result<Self, ShapeError> {
        let error = ShapeError { n, k, format };
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

/// Packs matrices, all their strips shared among the threads of `team`.
///
/// # Errors
/// When a format can't hold a weight, or f16 a scale or a minimum.
///
/// # Panics
/// When a size or a source does not fit its layout.
pub fn pack(team: &mut Team, matrices: &mut [Packing<'_>]) -> Result<(), NotFinite> {
    let Team { pool, isa, .. } = team;
    let isa = *isa;
    let mut ends = Vec::new();
    let mut strips = 0;
    let mut outs = Vec::new();
    let (mut blocks, mut floats) = (0, 0);
    for matrix in matrices.iter_mut() {
        let Layout { k, format, .. } = matrix.layout;
        assert_eq!(matrix.out.len(), matrix.layout.bytes);
        match matrix.source {
            Source::Blocks(_) => blocks = blocks.max(k / TILE * STRIP),
            Source::Floats(_) => floats = floats.max(k * STRIP),
        }
        assert_eq!(
            format.is_float(),
            matches!(matrix.source, Source::Floats(_))
        );
        strips += matrix.layout.strips();
        ends.push(strips);
        outs.push(Scatter::new(matrix.out));
    }
    let mut rows = vec![StripRows::new(blocks, floats); pool.threads()];
    let matrices = &*matrices;
    let worst = AtomicUsize::new(usize::MAX);
    pool.phase_with(&mut rows, strips, |rows, item| {
        let index = ends.partition_point(|&end| end <= item);
        let Packing { layout, source, .. } = &matrices[index];
        let strip = item + layout.strips() - ends[index];
        let bytes = layout.strip_bytes();
        // SAFETY: every item has its own strip.
        let out = unsafe { outs[index].part(strip * bytes, bytes) };
        if let Err(lane) = rows.pack(isa, layout, *source, strip, out) {
            worst.fetch_min(item * STRIP + lane, Ordering::Relaxed);
        }
    });
    let worst = worst.into_inner();
    if worst == usize::MAX {
        return Ok(());
    }
    let matrix = ends.partition_point(|&end| end <= worst / STRIP);
    let layout = &matrices[matrix].layout;
    Err(NotFinite {
        matrix,
        row: worst - (ends[matrix] - layout.strips()) * STRIP,
        format: layout.format,
    })
}
