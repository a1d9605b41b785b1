//! The product of activations and packed weights.
//!
//! Lanes are output rows and K is summed tile by tile in ascending order: the integer dot of
//! a tile is exact, and what follows is one fixed sequence of float operations,
//!
//! `acc = fma(dot, d * scale, acc)`, then `acc = fma(m, scale * sum, acc)` with a minimum,
//!
//! so a row has the same bits for every instruction set, batch and split.

mod dot;
mod gated;
mod kernel;
#[cfg(target_arch = "aarch64")]
mod neon;
mod panel;
mod prompt;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

pub use gated::gated;
pub(crate) use panel::Panel;

use crate::Isa;
use crate::logits::{BLOCK, tile_maxima};
use crate::pack::{Format, Layout, STRIP};
use crate::pool::Scatter;
use crate::quant::{Activations, Precision};
use crate::simd::{LANES, Lanes, dispatch};
use crate::team::Team;

/// Rows of activations that stay in the second-level cache while the strips pass.
pub(crate) const ROW_BLOCK: usize = 128;

/// Bytes of weights in a task: a microsecond or so of reading.
const TASK_BYTES: usize = 32 * 1024;

/// Least items for a thread, where there are strips enough.
const ITEMS: usize = 4;

/// Where a packed matrix lies.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// Its shape and format.
    pub layout: Layout,
    /// Its first byte.
    pub offset: usize,
}

/// Packed matrices stacked by rows: queries, keys and values, or gates and ups, are one map,
/// whatever the format of each.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    data: &'a [u8],
    parts: &'a [Placed],
}

/// What becomes of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It replaces what is there.
    Set,
    /// It is added to what is there.
    Add,
}

impl Write {
    /// Writes the first `count` lanes.
    ///
    /// # Safety
    /// As [`Lanes`]; `to` has room for `count` numbers, 16 at most.
    #[inline(always)]
    pub(crate) unsafe fn put<L: Lanes>(self, lanes: L, count: usize, to: *mut f32) {
        // SAFETY: the contract of this function.
        unsafe {
            if count == LANES {
                match self {
                    Self::Set => lanes.store(to),
                    Self::Add => L::load(to).add(lanes).store(to),
                }
                return;
            }
            let mut numbers = [0.0; LANES];
            lanes.store(numbers.as_mut_ptr());
            for (i, &number) in numbers[..count].iter().enumerate() {
                match self {
                    Self::Set => *to.add(i) = number,
                    Self::Add => *to.add(i) += number,
                }
            }
        }
    }
}

impl<'a> Linear<'a> {
    /// The matrices at their places in `data`, as [`pack`](crate::pack::pack) filled them.
    ///
    /// # Panics
    /// When one is outside of `data`, or they differ in columns.
    pub fn new(data: &'a [u8], parts: &'a [Placed]) -> Self {
        for Placed { layout, offset } in parts {
            assert!(*offset <= data.len() && layout.bytes() <= data.len() - offset);
            assert_eq!(layout.k(), parts[0].layout.k());
        }
        Self { data, parts }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.parts.iter().map(|part| part.layout.n()).sum()
    }

    /// Whether `acts` are its inputs, for so many rows.
    pub(crate) fn takes(&self, acts: &Activations, rows: usize) -> bool {
        rows <= acts.rows()
            && self.parts.iter().all(|Placed { layout, .. }| {
                layout.k() == acts.k() && acts.holds(layout.format().precision())
            })
    }

    /// Writes the outputs `columns`, which begin and end with strips or matrices, for `rows`.
    ///
    /// # Safety
    /// The machine has `isa`, the map [takes](Self::takes) the inputs, nobody writes them, and
    /// `out` has room for the outputs, which no other thread touches.
    pub(crate) unsafe fn columns(
        &self,
        isa: Isa,
        columns: Range<usize>,
        acts: &Activations,
        rows: Range<usize>,
        out: Outputs,
        panel: &mut Panel,
    ) {
        let mut first = 0;
        for Placed { layout, offset } in self.parts {
            let end = first + layout.n();
            let (from, to) = (columns.start.max(first), columns.end.min(end));
            if from < to {
                let strips = (from - first) / STRIP..(to - first).div_ceil(STRIP);
                assert!((from - first).is_multiple_of(STRIP));
                assert!(to == end || (to - first).is_multiple_of(STRIP));
                let task = Task {
                    layout,
                    data: &self.data[*offset..offset + layout.bytes()],
                    strips,
                    acts,
                    rows: rows.clone(),
                    out: Outputs {
                        start: out.start.wrapping_add(from - columns.start),
                        ..out
                    },
                };
                // SAFETY: the contract of this function.
                unsafe { task.run(isa, panel) };
            }
            first = end;
        }
    }
}

/// Where outputs go: column j of row i to `start + i * stride + j`.
#[derive(Clone, Copy)]
pub(crate) struct Outputs {
    pub(crate) start: *mut f32,
    pub(crate) stride: usize,
    pub(crate) write: Write,
}

/// The first `rows` rows of `acts` times a map of n outputs: output j of row i is
/// `out[i * n + j]`.
///
/// # Panics
/// When the shapes or the precision do not fit.
pub fn multiply(
    team: &mut Team,
    linear: Linear<'_>,
    acts: &Activations,
    rows: usize,
    out: &mut [f32],
    write: Write,
) {
    let to = (out, linear.n(), write);
    products(team, linear, acts, rows, to, 1, |_, _, _| {});
}

/// [`multiply`] for logits, with the greatest of each [`BLOCK`] of a row: to `out`, whose rows are
/// so many numbers apart, and to `maxima`, likewise.
///
/// # Panics
/// When the shapes or the precision do not fit, or the map is no single matrix.
pub fn logits(
    team: &mut Team,
    linear: Linear<'_>,
    acts: &Activations,
    rows: usize,
    (out, width): (&mut [f32], usize),
    (maxima, blocks): (&mut [f32], usize),
) {
    let isa = team.isa;
    assert!(linear.parts.len() == 1 && linear.n().div_ceil(BLOCK) <= blocks);
    assert!(maxima.len() >= rows * blocks);
    let maxima = Scatter::new(maxima);
    let to = (out, width, Write::Set);
    let unit = BLOCK / STRIP;
    products(team, linear, acts, rows, to, unit, |rows, columns, out| {
        let first = (
            rows.start * width + columns.start,
            rows.start * blocks + columns.start / BLOCK,
        );
        // SAFETY: the item has just written these outputs, and it alone has their blocks.
        unsafe {
            let (x, maxima) = (out.at(first.0).cast_const(), maxima.at(first.1));
            tile_maxima(
                isa,
                (x, width),
                (rows.len(), columns.len()),
                (maxima, blocks),
            );
        }
    });
}

/// The products, in items of a multiple of `unit` strips. Calls `then(rows, columns, out)` once
/// the outputs of an item are there.
fn products(
    team: &mut Team,
    linear: Linear<'_>,
    acts: &Activations,
    rows: usize,
    (out, stride, write): (&mut [f32], usize, Write),
    unit: usize,
    then: impl Fn(Range<usize>, Range<usize>, &Scatter<f32>) + Sync,
) {
    let (isa, threads) = (team.isa, team.threads());
    assert!(linear.takes(acts, rows) && linear.n() <= stride && out.len() >= rows * stride);
    // As many items for every thread, of equal size as far as units allow.
    let units = |part: &Placed| part.layout.strips().div_ceil(unit);
    let items = |part: &Placed| {
        let most = (TASK_BYTES / (unit * part.layout.strip_bytes())).max(1);
        let each = units(part).div_ceil(threads).div_ceil(most).max(ITEMS);
        units(part).min(threads * each)
    };
    let per_block: usize = linear.parts.iter().map(items).sum();
    let out = Scatter::new(out);
    let items_of_all = per_block * rows.div_ceil(ROW_BLOCK);
    team.pool
        .phase_with(&mut team.scratch, items_of_all, |scratch, item| {
            let (block, mut item) = (item / per_block, item % per_block);
            let rows = block * ROW_BLOCK..rows.min((block + 1) * ROW_BLOCK);
            let mut first = 0;
            for part in linear.parts {
                let (n, items) = (part.layout.n(), items(part));
                if item < items {
                    let border = |item| first + n.min(item * units(part) / items * unit * STRIP);
                    let columns = border(item)..border(item + 1);
                    let to = Outputs {
                        start: out.at(rows.start * stride + columns.start),
                        stride,
                        write,
                    };
                    let panel = &mut scratch.panel;
                    // SAFETY: items have disjoint outputs inside `out`, and the shapes fit.
                    unsafe {
                        linear.columns(isa, columns.clone(), acts, rows.clone(), to, panel);
                    }
                    then(rows, columns, &out);
                    return;
                }
                item -= items;
                first += n;
            }
        });
}

/// Some strips of a matrix for some rows.
struct Task<'a> {
    layout: &'a Layout,
    data: &'a [u8],
    strips: Range<usize>,
    acts: &'a Activations,
    rows: Range<usize>,
    /// Of the first strip and the first row.
    out: Outputs,
}

impl Task<'_> {
    /// # Safety
    /// As [`Linear::columns`].
    unsafe fn run(&self, isa: Isa, panel: &mut Panel) {
        use kernel::{floats, quants};
        let Range { start, end } = self.rows;
        let border = match self.format().precision() {
            Precision::Int8 => self.acts.first_pairs().clamp(start, end),
            _ => end,
        };
        if border < end {
            let skipped = (border - start) * self.out.stride;
            let task = Task {
                rows: border..end,
                strips: self.strips.clone(),
                out: Outputs {
                    start: self.out.start.wrapping_add(skipped),
                    ..self.out
                },
                ..*self
            };
            // SAFETY: the contract of this function.
            unsafe { prompt::run(isa, &task, panel) };
        }
        let task = &Task {
            rows: start..border,
            strips: self.strips.clone(),
            ..*self
        };
        match self.format() {
            Format::U4Zero => {
                dispatch!(isa, quants::<_, 4, false, false>(task: &Task<'_>, panel: &mut Panel))
            }
            Format::U4Min => {
                dispatch!(isa, quants::<_, 4, true, false>(task: &Task<'_>, panel: &mut Panel))
            }
            Format::U8Zero(_) => {
                dispatch!(isa, quants::<_, 8, false, false>(task: &Task<'_>, panel: &mut Panel))
            }
            Format::U8Min => {
                dispatch!(isa, quants::<_, 8, true, false>(task: &Task<'_>, panel: &mut Panel))
            }
            Format::U8Halves(_) => {
                dispatch!(isa, quants::<_, 8, false, true>(task: &Task<'_>, panel: &mut Panel))
            }
            Format::F32 | Format::F16 | Format::Bf16 => {
                dispatch!(isa, floats::<_>(task: &Task<'_>))
            }
        }
    }

    fn format(&self) -> Format {
        self.layout.format()
    }

    /// The tiles of a strip.
    #[inline(always)]
    fn strip(&self, strip: usize) -> &[u8] {
        let bytes = self.layout.strip_bytes();
        &self.data[strip * bytes..][..bytes]
    }

    /// Writes the outputs of a strip for a row.
    ///
    /// # Safety
    /// As [`Linear::columns`].
    #[inline(always)]
    unsafe fn put<L: Lanes>(&self, row: usize, strip: usize, sums: L) {
        let count = STRIP.min(self.layout.n() - strip * STRIP);
        let at = (row - self.rows.start) * self.out.stride + (strip - self.strips.start) * STRIP;
        // SAFETY: the caller excludes other threads and vouches for the room.
        unsafe {
            self.out
                .write
                .put(sums, count, self.out.start.wrapping_add(at))
        };
    }
}
