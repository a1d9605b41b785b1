//! The gated projection (SwiGLU, Shazeer 2020) as one phase: gates, ups, and their product
//! as the inputs of the next.

use super::{Linear, Outputs, ROW_BLOCK, Write};
use crate::math::silu;
use crate::quant::{Activations, BLOCK};
use crate::simd::{LANES, Lanes, dispatch};
use crate::team::{GATED, Team};

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
    let out = &*out;
    let items = blocks * rows.div_ceil(ROW_BLOCK);
    team.pool
        .phase_with(&mut team.scratch, items, |scratch, item| {
            let (first, block) = (item / blocks * ROW_BLOCK, item % blocks);
            let rows = first..rows.min(first + ROW_BLOCK);
            let tile = &mut scratch.tile[..rows.len() * GATED];
            for (half, column) in [block * BLOCK, width + block * BLOCK]
                .into_iter()
                .enumerate()
            {
                let to = Outputs {
                    start: tile[half * BLOCK..].as_mut_ptr(),
                    stride: GATED,
                    write: Write::Set,
                };
                let (columns, panel) = (column..column + BLOCK, &mut scratch.panel);
                // SAFETY: the shapes fit, and the tile is the item's own.
                unsafe { linear.columns(isa, columns, acts, rows.clone(), to, panel) };
            }
            // SAFETY: a kernel of lanes.
            dispatch!(isa, multiply_gates::<_>(tile: &mut [f32]));
            for (row, tile) in rows.zip(tile.chunks_exact(GATED)) {
                // SAFETY: every block of a row is one item's own.
                unsafe { out.write_shared(isa, row, block * BLOCK, &tile[..BLOCK]) };
            }
        });
}

/// Replaces gates by their products.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn multiply_gates<L: Lanes>(tile: &mut [f32]) {
    for row in tile.chunks_exact_mut(GATED) {
        for i in (0..BLOCK).step_by(LANES) {
            let gate = row[i..].as_mut_ptr();
            // SAFETY: a row has the gates, then as many ups.
            unsafe {
                silu(L::load(gate))
                    .mul(L::load(gate.add(BLOCK)))
                    .store(gate);
            }
        }
    }
}
