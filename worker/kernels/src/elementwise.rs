//! What lies between the matrix products, where it is no part of one.

use crate::norm::rms_norm;
use crate::quant::Activations;
use crate::team::Team;

/// Rows that one thread does at once; fewer are not worth waking another.
const ROWS: usize = 4;

/// Normalises rows of `weight.len()` numbers and quantises them: row i of `out` is row
/// `pick[i]` of `x`, or row i without `pick`.
///
/// # Panics
/// When the shapes do not fit.
pub fn norm_quantize(
    team: &mut Team,
    x: &[f32],
    pick: Option<&[u32]>,
    weight: &[f32],
    eps: f32,
    out: &mut Activations,
) {
    let (width, isa) = (weight.len(), team.isa);
    let rows = pick.map_or(x.len() / width, <[u32]>::len);
    assert!(rows <= out.rows() && width == out.k());
    let out = &*out;
    team.pool
        .phase_with(&mut team.scratch, rows.div_ceil(ROWS), |scratch, item| {
            let normal = &mut scratch.tile[..width];
            for row in item * ROWS..rows.min((item + 1) * ROWS) {
                let from = pick.map_or(row, |pick| pick[row] as usize);
                rms_norm(isa, &x[from * width..][..width], weight, eps, normal);
                // SAFETY: every row is one item's own.
                unsafe { out.write_shared(isa, row, 0, normal) };
            }
        });
}
