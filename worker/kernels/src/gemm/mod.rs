//! The product of activations and packed weights.
//!
//! Lanes are output rows and K is summed tile by tile in ascending order: the integer dot of
//! a tile is exact, and what follows is one fixed sequence of float operations,
//!
//! `acc = fma(dot, d * scale, acc)`, then `acc = fma(m, scale * sum, acc)` with a minimum,
//!
//! so a row has the same bits for every instruction set, batch and split.

mod dot;
mod kernel;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use crate::Isa;
use crate::pack::{Format, Layout, STRIP};
use crate::pool::{Pool, Scatter};
use crate::quant::Activations;
use crate::simd::dispatch;

/// Rows of activations that stay in the second-level cache while the strips pass.
const ROW_BLOCK: usize = 128;

/// Bytes of weights in a task: a microsecond or so of reading.
const TASK_BYTES: usize = 32 * 1024;

/// A packed matrix.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    layout: Layout,
    data: &'a [u8],
}

/// What becomes of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It replaces what is there.
    Set,
    /// It is added to what is there.
    Add,
}

impl<'a> Matrix<'a> {
    /// `data` as [`Layout::pack`] filled it.
    ///
    /// # Panics
    /// When `data` is not of the layout's size.
    pub fn new(layout: Layout, data: &'a [u8]) -> Self {
        assert_eq!(data.len(), layout.bytes());
        Self { layout, data }
    }

    /// Its shape and format.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Strips in a task.
    fn chunk(&self, threads: usize) -> usize {
        let fair = self.layout.strips().div_ceil(4 * threads);
        (TASK_BYTES / self.layout.strip_bytes()).clamp(1, fair)
    }
}

/// The first `rows` rows of `acts` times matrices whose outputs lie side by side: with `n`
/// their rows in all, output j of row i is `out[i * n + j]`. Queries, keys and values, or gates
/// and ups, are one product, whatever the format of each.
///
/// # Panics
/// When the shapes or the precision do not fit, or the machine lacks `isa`.
pub fn multiply(
    pool: &mut Pool,
    isa: Isa,
    matrices: &[Matrix<'_>],
    acts: &Activations,
    rows: usize,
    out: &mut [f32],
    write: Write,
) {
    let isa = isa.checked();
    let width = matrices.iter().map(|m| m.layout.n()).sum();
    assert!(rows <= acts.rows() && out.len() >= rows * width);
    for matrix in matrices {
        assert_eq!(matrix.layout.k(), acts.k());
        assert!(acts.holds(matrix.layout.format().precision()));
    }
    let threads = pool.threads();
    let chunks = |m: &Matrix<'_>| m.layout.strips().div_ceil(m.chunk(threads));
    let per_block: usize = matrices.iter().map(chunks).sum();
    let out = Scatter::new(out);
    pool.phase(per_block * rows.div_ceil(ROW_BLOCK), |item| {
        let (block, mut item) = (item / per_block, item % per_block);
        let mut column = 0;
        for matrix in matrices {
            if item < chunks(matrix) {
                let chunk = matrix.chunk(threads);
                let strips = item * chunk..matrix.layout.strips().min((item + 1) * chunk);
                let task = Task {
                    matrix,
                    strips,
                    acts,
                    rows: block * ROW_BLOCK..rows.min((block + 1) * ROW_BLOCK),
                    out: &out,
                    width,
                    column,
                    write,
                };
                // SAFETY: tasks have disjoint outputs, the shapes fit, and the isa is there.
                unsafe { task.run(isa) };
                return;
            }
            item -= chunks(matrix);
            column += matrix.layout.n();
        }
    });
}

/// Some strips of a matrix for some rows.
struct Task<'a> {
    matrix: &'a Matrix<'a>,
    strips: Range<usize>,
    acts: &'a Activations,
    rows: Range<usize>,
    out: &'a Scatter<f32>,
    /// Outputs of a row.
    width: usize,
    /// The matrix's first output in a row.
    column: usize,
    write: Write,
}

impl Task<'_> {
    /// # Safety
    /// The machine has `isa`, the shapes fit, and no other thread touches the task's outputs.
    unsafe fn run(&self, isa: Isa) {
        use kernel::{floats, quants};
        let task = self;
        match self.format() {
            Format::U4Zero => dispatch!(isa, quants::<_, 4, false, false>(task: &Task<'_>)),
            Format::U4Min => dispatch!(isa, quants::<_, 4, true, false>(task: &Task<'_>)),
            Format::U8Zero(_) => dispatch!(isa, quants::<_, 8, false, false>(task: &Task<'_>)),
            Format::U8Min => dispatch!(isa, quants::<_, 8, true, false>(task: &Task<'_>)),
            Format::U8Halves(_) => dispatch!(isa, quants::<_, 8, false, true>(task: &Task<'_>)),
            Format::F32 | Format::F16 | Format::Bf16 => {
                dispatch!(isa, floats::<_>(task: &Task<'_>))
            }
        }
    }

    fn format(&self) -> Format {
        self.matrix.layout.format()
    }

    /// The tiles of a strip.
    #[inline(always)]
    fn strip(&self, strip: usize) -> &[u8] {
        let bytes = self.matrix.layout.strip_bytes();
        &self.matrix.data[strip * bytes..][..bytes]
    }

    /// Writes the outputs of a strip for a row.
    ///
    /// # Safety
    /// No other thread touches them at the same time.
    #[inline(always)]
    unsafe fn put(&self, row: usize, strip: usize, sums: &[f32; STRIP]) {
        let first = strip * STRIP;
        let count = STRIP.min(self.matrix.layout.n() - first);
        let at = row * self.width + self.column + first;
        // SAFETY: the caller excludes other threads; the bounds are asserted there.
        let out = unsafe { self.out.part(at, count) };
        match (self.write, out.first_chunk_mut::<STRIP>()) {
            (Write::Set, Some(out)) => *out = *sums,
            (Write::Set, None) => out.copy_from_slice(&sums[..count]),
            (Write::Add, _) => out.iter_mut().zip(sums).for_each(|(o, s)| *o += s),
        }
    }
}
