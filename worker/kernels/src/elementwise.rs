//! What lies between the matrix products: each phase leaves its rows quantised for the next.

use crate::Isa;
use crate::math::silu;
use crate::norm::rms_norm;
use crate::pool::Pool;
use crate::quant::Activations;
use crate::simd::{LANES, Lanes, dispatch};

/// Rows that one thread does at once; fewer are not worth waking another.
const ROWS: usize = 4;

fn by_rows(pool: &mut Pool, rows: usize, each: impl Fn(usize) + Sync) {
    pool.phase(rows.div_ceil(ROWS), |item| {
        (item * ROWS..rows.min((item + 1) * ROWS)).for_each(&each);
    });
}

/// Normalises rows of `weight.len()` numbers and quantises them: row i of `out` is row
/// `pick[i]` of `x`, or row i without `pick`.
///
/// # Panics
/// When the shapes do not fit.
pub fn norm_quantize(
    pool: &mut Pool,
    isa: Isa,
    x: &[f32],
    pick: Option<&[u32]>,
    weight: &[f32],
    eps: f32,
    out: &mut Activations,
) {
    let width = weight.len();
    let rows = pick.map_or(x.len() / width, <[u32]>::len);
    assert!(rows <= out.rows() && width == out.k());
    let out = &*out;
    by_rows(pool, rows, |row| {
        let from = pick.map_or(row, |pick| pick[row] as usize);
        let mut normal = vec![0.0; width];
        rms_norm(isa, &x[from * width..][..width], weight, eps, &mut normal);
        // SAFETY: every row is one item's own.
        unsafe { out.write_shared(isa, row, 0, &normal) };
    });
}

/// Quantises rows as they are.
///
/// # Panics
/// When the shapes do not fit.
pub fn quantize(pool: &mut Pool, isa: Isa, x: &[f32], out: &mut Activations) {
    let width = out.k();
    assert!(x.len().is_multiple_of(width) && x.len() / width <= out.rows());
    let out = &*out;
    by_rows(pool, x.len() / width, |row| {
        // SAFETY: every row is one item's own.
        unsafe { out.write_shared(isa, row, 0, &x[row * width..][..width]) };
    });
}

/// Quantises `silu(gate) * up` of rows that hold the gates, then the ups (SwiGLU, Shazeer 2020).
///
/// # Panics
/// When the shapes do not fit.
pub fn silu_quantize(pool: &mut Pool, isa: Isa, gate_up: &[f32], out: &mut Activations) {
    let width = out.k();
    assert!(width.is_multiple_of(LANES));
    assert!(gate_up.len().is_multiple_of(2 * width) && gate_up.len() / (2 * width) <= out.rows());
    let out = &*out;
    by_rows(pool, gate_up.len() / (2 * width), |row| {
        let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
        let mut hidden = vec![0.0; width];
        let to = hidden.as_mut_ptr();
        let (gate, up) = (gate.as_ptr(), up.as_ptr());
        // SAFETY: all three have `width` elements, a multiple of 16.
        dispatch!(isa, gated::<_>(gate: *const f32, up: *const f32, to: *mut f32, width: usize));
        // SAFETY: every row is one item's own.
        unsafe { out.write_shared(isa, row, 0, &hidden) };
    });
}

/// # Safety
/// See [`Lanes`]; the pointers stand for `n` elements.
#[inline(always)]
unsafe fn gated<L: Lanes>(gate: *const f32, up: *const f32, out: *mut f32, n: usize) {
    // SAFETY: the contract of this function.
    unsafe {
        for i in (0..n).step_by(LANES) {
            let hidden = silu(L::load(gate.add(i))).mul(L::load(up.add(i)));
            hidden.store(out.add(i));
        }
    }
}
