//! The gated projection (SwiGLU, Shazeer 2020) as one phase: gates, ups, and their product
//! as the inputs of the next.

use super::{ITEMS, Linear, Outputs, ROW_BLOCK, Write};
use crate::math::silu;
use crate::quant::{Activations, BLOCK};
use crate::simd::{LANES, Lanes, dispatch};
use crate::team::Team;

/// Writes `silu(gate) * up` to the first `rows` rows of `out`, for a map whose outputs are the
/// gates, then the ups.
///
/// # Panics
/// When the shapes or the precision do not fit.
pub fn gated(
    team: &mut Team,
    linear: Linear<'_>,
    acts: &Activations,
    rows: usize,
    out: &mut Activations,
) {
    let (width, isa) = (out.k(), team.isa);
    assert!(linear.takes(acts, rows) && rows <= out.rows());
    assert!(linear.n() == 2 * width && width.is_multiple_of(BLOCK));
    let blocks = width / BLOCK;
    // Few rows are read the quicker the longer the stretches of weights are.
    let row_block = rows.min(ROW_BLOCK).max(1);
    let most = (ROW_BLOCK / row_block).min(blocks / (ITEMS * team.threads()));
    let together = BLOCK * (1..=most).rev().find(|n| blocks % n == 0).unwrap_or(1);
    let blocks = width / together;
    let out = &*out;
    let items = blocks * rows.div_ceil(ROW_BLOCK);
    team.pool
        .phase_with(&mut team.scratch, items, |scratch, item| {
            let (first, block) = (item / blocks * ROW_BLOCK, item % blocks);
            let rows = first..rows.min(first + ROW_BLOCK);
            let tile = &mut scratch.tile[..rows.len() * 2 * together];
            let column = block * together;
            for (half, column) in [column, width + column].into_iter().enumerate() {
                let to = Outputs {
                    start: tile[half * together..].as_mut_ptr(),
                    stride: 2 * together,
                    write: Write::Set,
                };
                let (columns, panel) = (column..column + together, &mut scratch.panel);
                // SAFETY: the shapes fit, and the tile is the item's own.
                unsafe { linear.columns(isa, columns, acts, rows.clone(), to, panel) };
            }
            // SAFETY: a kernel of lanes.
            dispatch!(isa, multiply_gates::<_>(tile: &mut [f32], together: usize));
            for (row, tile) in rows.zip(tile.chunks_exact(2 * together)) {
                // SAFETY: every block of a row is one item's own.
                unsafe { out.write_shared(isa, row, column, &tile[..together]) };
            }
        });
}

/// Replaces rows of gates, each followed by as many ups, by their products.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn multiply_gates<L: Lanes>(tile: &mut [f32], width: usize) {
    for row in tile.chunks_exact_mut(2 * width) {
        for i in (0..width).step_by(LANES) {
            let gate = row[i..].as_mut_ptr();
            // SAFETY: a row has the gates, then as many ups.
            unsafe {
                silu(L::load(gate))
                    .mul(L::load(gate.add(width)))
                    .store(gate);
            }
        }
    }
}
