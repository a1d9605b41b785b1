//! The product for rows of prompts: weights and activations are brain floats.
//!
//! The weights of a strip or two are [widened](super::panel) once for all rows. Lanes are output
//! rows, and K is summed in ascending order: pair by pair, each sum rounded, as
//! [`Pairs::dot`](crate::bf16::Pairs::dot) does, or in [tile order](crate::amx). Either gives a row
//! the same bits for every instruction set, batch and split.

use std::ops::Range;

use super::dot::Dot;
use super::panel::{Panel, widen};
use super::{Outputs, Task};
use crate::Isa;
use crate::amx::{self, Product};
use crate::bf16::{Pairs, dispatch_pairs};
use crate::pack::STRIP;
use crate::quant::{BLOCK, PAIR_GROUP, SumOrder};

/// Words of a strip that is multiplied together with the next: two fit in the second-level cache
/// beside the rows.
const TOGETHER: usize = 32 * 1024;

/// Runs a task on quantised weights whose rows are kept as bf16.
///
/// # Safety
/// As [`Linear::columns`](super::Linear::columns).
pub(super) unsafe fn run(isa: Isa, task: &Task<'_>, panel: &mut Panel) {
    match task.acts.order() {
        // SAFETY: the contract of this function.
        SumOrder::Pairs => dispatch_pairs!(isa, strips(task: &Task<'_>, panel: &mut Panel)),
        // SAFETY: as above.
        SumOrder::Tiles => unsafe { tiles(isa, task, panel) },
    }
}

/// The same in tile order.
///
/// # Safety
/// As [`run`].
unsafe fn tiles(isa: Isa, task: &Task<'_>, panel: &mut Panel) {
    let (k, first) = (task.layout.k(), task.acts.first_pairs());
    let words = k / 2 * STRIP;
    let start = panel.room(2, k);
    // Products begin with a group of rows; what comes before the first is one of its own.
    let border = first + (task.rows.start - first).next_multiple_of(PAIR_GROUP);
    let border = border.min(task.rows.end);
    for at in task.strips.clone().step_by(2) {
        let strips = at..task.strips.end.min(at + 2);
        let both = strips.clone();
        // SAFETY: there is room for two strips; the rest is the contract of this function.
        dispatch_pairs!(isa, panels(task: &Task<'_>, both: Range<usize>, start: *mut u32));
        let panels = [0, 1].map(|i| start.wrapping_add(i * words).cast_const());
        for rows in [task.rows.start..border, border..task.rows.end] {
            if rows.is_empty() {
                continue;
            }
            let skipped = (rows.start - task.rows.start) * task.out.stride
                + (strips.start - task.strips.start) * STRIP;
            let product = Product {
                panels: &panels[..strips.len()],
                n: (strips.len() * STRIP).min(task.layout.n() - strips.start * STRIP),
                blocks: k / BLOCK,
                acts: task.acts.pairs(rows.start, 0).cast_const().cast(),
                rows: rows.len(),
                out: Outputs {
                    start: task.out.start.wrapping_add(skipped),
                    ..task.out
                },
            };
            // SAFETY: the panels are there; the rest is the contract of this function. The first
            // rows are less than a group, from which on they lie as one that begins with them.
            unsafe {
                if rows.start < border {
                    amx::in_software(isa, &product);
                } else {
                    amx::multiply(isa, &product);
                }
            }
        }
    }
}

/// Widens strips, one after the other.
///
/// # Safety
/// As [`run`], on the machine of `L` and `P`; `start` has room for them.
#[inline(always)]
unsafe fn panels<L: Dot, P: Pairs<L>>(task: &Task<'_>, strips: Range<usize>, start: *mut u32) {
    let words = task.layout.k() / 2 * STRIP;
    for (i, strip) in strips.enumerate() {
        // SAFETY: the contract of this function.
        unsafe { widen::<L, P>(task.format(), task.strip(strip), start.add(i * words)) };
    }
}

/// # Safety
/// As [`run`], on the machine of `L` and `P`.
#[inline(always)]
unsafe fn strips<L: Dot, P: Pairs<L>>(task: &Task<'_>, panel: &mut Panel) {
    let words = task.layout.k() / 2 * STRIP;
    let most = if P::WIDE && words <= TOGETHER { 2 } else { 1 };
    let start = panel.room(most, task.layout.k());
    for first in task.strips.clone().step_by(most) {
        let strips = first..task.strips.end.min(first + most);
        // SAFETY: there is room for so many strips; the rest is the contract of this function.
        unsafe {
            panels::<L, P>(task, strips.clone(), start);
            if strips.len() == 2 {
                rows::<L, P, 2>(task, strips, start);
            } else {
                rows::<L, P, 1>(task, strips, start);
            }
        }
    }
}

/// # Safety
/// As [`run`]; `panel` has the `S` strips.
#[inline(always)]
unsafe fn rows<L: Dot, P: Pairs<L>, const S: usize>(
    task: &Task<'_>,
    strips: Range<usize>,
    panel: *const u32,
) {
    let first = task.acts.first_pairs();
    let mut row = task.rows.start;
    while row < task.rows.end {
        // Rows of a group lie together; a kernel never crosses one.
        let at = (row - first) % PAIR_GROUP;
        let count = (L::ROWS - at % L::ROWS).min(task.rows.end - row);
        macro_rules! rows {
            ($m:literal) => {{
                // SAFETY: the contract of this function.
                unsafe {
                    let sums = sums::<L, P, S, $m>(task, row, panel);
                    for (i, sums) in sums.into_iter().enumerate() {
                        for (strip, sum) in strips.clone().zip(sums) {
                            task.put(row + i, strip, sum);
                        }
                    }
                }
            }};
        }
        match count {
            8 if L::ROWS >= 8 => rows!(8),
            7 if L::ROWS >= 8 => rows!(7),
            6 if L::ROWS >= 8 => rows!(6),
            5 if L::ROWS >= 8 => rows!(5),
            4 if L::ROWS >= 4 => rows!(4),
            3 if L::ROWS >= 4 => rows!(3),
            2 => rows!(2),
            _ => rows!(1),
        }
        row += count;
    }
}

/// The sums of `M` rows of a group with `S` strips.
///
/// # Safety
/// As [`rows`].
#[inline(always)]
unsafe fn sums<L: Dot, P: Pairs<L>, const S: usize, const M: usize>(
    task: &Task<'_>,
    row: usize,
    panel: *const u32,
) -> [[L; S]; M] {
    let blocks = task.layout.k() / BLOCK;
    let acts = task.acts.pairs(row, 0).cast_const().cast::<u32>();
    // SAFETY: the contract of this function.
    unsafe {
        let mut sums = [[L::splat(0.0); S]; M];
        for block in 0..blocks {
            let acts = acts.add(block * PAIR_GROUP * BLOCK / 2);
            for pair in 0..BLOCK / 2 {
                let words: [P::Words; S] = std::array::from_fn(|s| {
                    let strip = panel.add(s * blocks * BLOCK / 2 * STRIP);
                    P::load(strip.add((block * BLOCK / 2 + pair) * STRIP))
                });
                for (i, sums) in sums.iter_mut().enumerate() {
                    let by = P::by(*acts.add(i * BLOCK / 2 + pair));
                    for (sum, words) in sums.iter_mut().zip(words) {
                        *sum = P::dot(*sum, words, &by);
                    }
                }
            }
        }
        sums
    }
}
