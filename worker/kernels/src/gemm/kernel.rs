//! The kernel, written once for every instruction set: its float operations are those of
//! [`Lanes`](crate::simd::Lanes), its integer dots are exact.

use crate::quant::{GROUP, QuantBlock};

use super::dot::{Dot, Part};
use super::{Panel, Task};
use crate::pack::{Format, STRIP};

/// Tiles to ask for ahead of the one in use, where the next strip is too far.
const AHEAD: usize = 4;

/// Prepares every strip, computes the sums of its rows with their count as a constant, and stores
/// them.
macro_rules! by_rows {
    ($task:ident, $L:ident, |$strip:ident| $tiles:expr, |$data:ident, $row:ident, $M:ident| $sums:expr) => {
        for $strip in $task.strips.clone() {
            let $data: &[u8] = $tiles;
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
                    4 if $L::ROWS >= 4 => rows!(4),
                    3 if $L::ROWS >= 4 => rows!(3),
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
/// For many rows, quants of four bits are [widened](widen) once in `panel`.
///
/// # Safety
/// The machine has the instruction set of `L`, the constants are those of the matrix, and no
/// other thread touches the outputs of the task.
#[inline(always)]
pub(super) unsafe fn quants<L: Dot, const V: usize, const MIN: bool, const HALVES: bool>(
    task: &Task<'_>,
    panel: &mut Panel,
) {
    // SAFETY: the contract of this function; a strip has its tiles and the rows their blocks.
    unsafe {
        if V == 4 && L::MANY.is_some_and(|many| task.rows.len() >= many) {
            by_rows!(
                task,
                L,
                |strip| widen::<L>(task.format(), task.strip(strip), panel),
                |tiles, row, M| {
                    let acts = task.acts.block(row, 0).cast_const();
                    quant_strip::<L, 8, MIN, HALVES, true, M>(tiles, acts)
                }
            );
        } else {
            by_rows!(task, L, |strip| task.strip(strip), |tiles, row, M| {
                let acts = task.acts.block(row, 0).cast_const();
                quant_strip::<L, V, MIN, HALVES, false, M>(tiles, acts)
            });
        }
    }
}

/// A strip of four bits with its quants as eight and its scales as floats.
///
/// # Safety
/// As [`quants`].
#[inline(always)]
unsafe fn widen<'a, L: Dot>(format: Format, strip: &[u8], panel: &'a mut Panel) -> &'a [u8] {
    let (head, tile) = (format.head_bytes(), format.tile_bytes());
    let wide = 2 * head + 8 * 64;
    let out = panel.bytes(strip.len() / tile * wide);
    for (tile, out) in strip.chunks_exact(tile).zip(out.chunks_exact_mut(wide)) {
        for line in (0..tile.len()).step_by(64) {
            // Of the next strip, which comes while the rows of this one are computed.
            L::prefetch(tile.as_ptr().wrapping_add(strip.len() + line));
        }
        let (half, quants) = tile.split_at(head);
        let (float, out) = out.split_at_mut(2 * head);
        for (half, float) in half
            .chunks_exact(2 * STRIP)
            .zip(float.chunks_exact_mut(4 * STRIP))
        {
            // SAFETY: sixteen f16, and room for as many floats.
            unsafe { L::f16(half.as_ptr()).store(float.as_mut_ptr().cast()) };
        }
        // The second four columns of eight are in the high nibbles.
        for (vector, out) in quants.chunks_exact(64).zip(out.chunks_exact_mut(128)) {
            let (low, high) = out.split_at_mut(64);
            for ((&q, low), high) in vector.iter().zip(low).zip(high) {
                (*low, *high) = (q & 0xf, q >> 4);
            }
        }
    }
    out
}

/// The sums of a strip, [widened](widen) or not, for `M` rows.
///
/// # Safety
/// As [`quants`]; `acts` are the first blocks of the rows.
#[inline(always)]
unsafe fn quant_strip<
    L: Dot,
    const V: usize,
    const MIN: bool,
    const HALVES: bool,
    const WIDE: bool,
    const M: usize,
>(
    strip: &[u8],
    mut acts: *const QuantBlock,
) -> [L; M] {
    // Bytes of sixteen scales.
    let vector = if WIDE { 4 * STRIP } else { 2 * STRIP };
    let head = if MIN || HALVES { 2 * vector } else { vector };
    let zero = match (MIN, WIDE || V == 4) {
        (true, _) => 0,
        (_, true) => 8,
        _ => 128,
    };
    // SAFETY: the contract of this function; blocks of one row are `GROUP` apart.
    unsafe {
        let mut sums = [L::splat(0.0); M];
        for tile in strip.chunks_exact(head + V * 64) {
            let tile = tile.as_ptr();
            if !WIDE {
                // Many rows take long enough for the next strip to come from memory; with few, the
                // machine's own prefetching is at work on this one and wants help only.
                let ahead = match 2 * M > V {
                    true => strip.len(),
                    false => AHEAD * (head + V * 64),
                };
                for line in (0..head + V * 64).step_by(64) {
                    L::prefetch(tile.wrapping_add(ahead + line));
                }
            }
            let quants = tile.add(head);
            let first = if HALVES { Part::Low } else { Part::All };
            let dots: [L; M] = L::dots::<V, WIDE, M>(quants, acts, first, zero);
            let floats = |at: *const u8| if WIDE { L::load(at.cast()) } else { L::f16(at) };
            let scales = floats(tile);
            let second = if MIN || HALVES {
                floats(tile.add(vector))
            } else {
                scales
            };
            for (i, (sums, dot)) in sums.iter_mut().zip(dots).enumerate() {
                let act = &*acts.add(i);
                *sums = dot.fma(scales.mul(L::splat(act.scale)), *sums);
                if MIN {
                    *sums = second.fma(L::splat(act.scaled_sum), *sums);
                }
            }
            if HALVES {
                let dots: [L; M] = L::dots::<V, WIDE, M>(quants, acts, Part::High, zero);
                for (i, (sums, dot)) in sums.iter_mut().zip(dots).enumerate() {
                    *sums = dot.fma(second.mul(L::splat((*acts.add(i)).scale)), *sums);
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
            Format::F16 => by_rows!(task, L, |strip| task.strip(strip), |tiles, row, M| {
                float_strip::<L, 32, M>(tiles, task.acts.float(row, 0), |p| L::f16(p))
            }),
            Format::Bf16 => by_rows!(task, L, |strip| task.strip(strip), |tiles, row, M| {
                float_strip::<L, 32, M>(tiles, task.acts.float(row, 0), |p| L::bf16(p))
            }),
            _ => by_rows!(task, L, |strip| task.strip(strip), |tiles, row, M| {
                float_strip::<L, 64, M>(tiles, task.acts.float(row, 0), |p| L::load(p.cast()))
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
