//! The kernel, written once for every instruction set: its float operations are those of
//! [`Lanes`](crate::simd::Lanes), its integer dots are exact.

use crate::quant::{GROUP, QuantBlock};

use super::Task;
use super::dot::{Dot, Part};
use crate::pack::{Format, STRIP};

/// Tiles to ask for ahead of the one in use, where the next strip is too far.
const AHEAD: usize = 4;

/// Runs `$strip::<L, …, M>($args)` with the count of rows as a constant and stores the sums.
macro_rules! by_rows {
    ($task:ident, $L:ident, |$strip:ident, $row:ident, $M:ident| $sums:expr) => {
        for $strip in $task.strips.clone() {
            let mut $row = $task.rows.start;
            while $row < $task.rows.end {
                // Rows of a group lie together; a kernel never crosses one.
                let count = ($L::ROWS - $row % $L::ROWS).min($task.rows.end - $row);
                macro_rules! rows {
                    ($m:literal) => {{
                        const $M: usize = $m;
                        let sums: [$L; $M] = $sums;
                        for (i, sums) in sums.into_iter().enumerate() {
                            $task.put($row + i, $strip, sums);
                        }
                    }};
                }
                match count {
                    8 if $L::ROWS >= 8 => rows!(8),
                    7 if $L::ROWS >= 8 => rows!(7),
                    6 if $L::ROWS >= 8 => rows!(6),
                    5 if $L::ROWS >= 8 => rows!(5),
                    4 => rows!(4),
                    3 => rows!(3),
                    2 => rows!(2),
                    _ => rows!(1),
                }
                $row += count;
            }
        }
    };
}

/// A task on quantised weights of `V` vectors in a tile, with minima or with scales for halves.
///
/// # Safety
/// The machine has the instruction set of `L`, the constants are those of the matrix, and no
/// other thread touches the outputs of the task.
#[inline(always)]
pub(super) unsafe fn quants<L: Dot, const V: usize, const MIN: bool, const HALVES: bool>(
    task: &Task<'_>,
) {
    // SAFETY: the contract of this function; a strip has its tiles and the rows their blocks.
    unsafe {
        by_rows!(task, L, |strip, row, M| {
            let acts = task.acts.block(row, 0).cast_const();
            quant_strip::<L, V, MIN, HALVES, M>(task.strip(strip), acts)
        });
    }
}

/// The sums of a strip for `M` rows.
///
/// # Safety
/// As [`quants`]; `acts` are the first blocks of the rows.
#[inline(always)]
unsafe fn quant_strip<
    L: Dot,
    const V: usize,
    const MIN: bool,
    const HALVES: bool,
    const M: usize,
>(
    strip: &[u8],
    mut acts: *const QuantBlock,
) -> [L; M] {
    let head = if MIN || HALVES { 4 * STRIP } else { 2 * STRIP };
    let zero = match (MIN, V) {
        (true, _) => 0,
        (_, 4) => 8,
        _ => 128,
    };
    // SAFETY: the contract of this function; blocks of one row are `GROUP` apart.
    unsafe {
        let mut sums = [L::splat(0.0); M];
        for tile in strip.chunks_exact(head + V * 64) {
            let tile = tile.as_ptr();
            // Many rows take long enough for the next strip to come from memory; with few, the
            // machine's own prefetching is at work on this one and wants help only.
            let ahead = match 2 * M > V {
                true => strip.len(),
                false => AHEAD * (head + V * 64),
            };
            for line in (0..head + V * 64).step_by(64) {
                L::prefetch(tile.wrapping_add(ahead + line));
            }
            let scales = L::f16(tile);
            let second = if MIN || HALVES {
                L::f16(tile.add(2 * STRIP))
            } else {
                scales
            };
            let quants = L::unpack::<V>(tile.add(head));
            for (i, sums) in sums.iter_mut().enumerate() {
                let act = &*acts.add(i);
                let scale = L::splat(act.scale);
                if HALVES {
                    let low = L::dot::<V>(&quants, act, Part::Low, zero);
                    let high = L::dot::<V>(&quants, act, Part::High, zero);
                    *sums = low.fma(scales.mul(scale), *sums);
                    *sums = high.fma(second.mul(scale), *sums);
                } else {
                    let dot = L::dot::<V>(&quants, act, Part::All, zero);
                    *sums = dot.fma(scales.mul(scale), *sums);
                    if MIN {
                        *sums = second.fma(L::splat(act.scaled_sum), *sums);
                    }
                }
            }
            acts = acts.add(GROUP);
        }
        sums
    }
}

/// A task on weights of floats.
///
/// # Safety
/// As [`quants`].
#[inline(always)]
pub(super) unsafe fn floats<L: Dot>(task: &Task<'_>) {
    // SAFETY: as in `quants`.
    unsafe {
        match task.format() {
            Format::F16 => by_rows!(task, L, |strip, row, M| {
                float_strip::<L, 32, M>(task.strip(strip), task.acts.float(row, 0), |p| L::f16(p))
            }),
            Format::Bf16 => by_rows!(task, L, |strip, row, M| {
                float_strip::<L, 32, M>(task.strip(strip), task.acts.float(row, 0), |p| L::bf16(p))
            }),
            _ => by_rows!(task, L, |strip, row, M| {
                float_strip::<L, 64, M>(task.strip(strip), task.acts.float(row, 0), |p| {
                    L::load(p.cast())
                })
            }),
        }
    }
}

/// The sums of a strip of tiles of `BYTES` for `M` rows.
///
/// # Safety
/// As [`quants`]; `acts` are the first values of the rows, `load` reads a tile.
#[inline(always)]
unsafe fn float_strip<L: Dot, const BYTES: usize, const M: usize>(
    strip: &[u8],
    acts: *const f32,
    load: impl Fn(*const u8) -> L,
) -> [L; M] {
    let mut acts = acts;
    // SAFETY: the contract of this function; values of one row are `GROUP` apart.
    unsafe {
        let mut sums = [L::splat(0.0); M];
        for tile in strip.chunks_exact(BYTES) {
            let weights = load(tile.as_ptr());
            for (i, sums) in sums.iter_mut().enumerate() {
                *sums = weights.fma(L::splat(*acts.add(i)), *sums);
            }
            acts = acts.add(GROUP);
        }
        sums
    }
}
