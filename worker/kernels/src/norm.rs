//! RMS norm (Zhang and Sennrich 2019).

use crate::Isa;
use crate::simd::{LANES, Lanes, dispatch};

/// `out = x / sqrt(mean(x²) + eps) * weight`, over slices of one length, a multiple of 16.
///
/// # Panics
/// When the lengths differ or are not a multiple of 16.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len();
    assert!(n == weight.len() && n == out.len() && n.is_multiple_of(LANES));
    let (x, weight, out) = (x.as_ptr(), weight.as_ptr(), out.as_mut_ptr());
    // SAFETY: the three slices have `n` elements.
    dispatch!(isa, kernel::<_>(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, n: usize));
}

/// The same in place.
///
/// # Panics
/// When the lengths differ or are not a multiple of 16.
pub fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    let n = x.len();
    assert!(n == weight.len() && n.is_multiple_of(LANES));
    let (out, weight) = (x.as_mut_ptr(), weight.as_ptr());
    let x = out.cast_const();
    // SAFETY: both slices have `n` elements; the kernel reads an element before it writes it.
    dispatch!(isa, kernel::<_>(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, n: usize));
}

/// # Safety
/// See [`Lanes`]; the pointers stand for `n` elements.
#[inline(always)]
unsafe fn kernel<L: Lanes>(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, n: usize) {
    // SAFETY: the contract of this function.
    unsafe {
        let mut squares = L::splat(0.0);
        for i in (0..n).step_by(LANES) {
            let v = L::load(x.add(i));
            squares = v.fma(v, squares);
        }
        let scale = 1.0 / (squares.sum() / n as f32 + eps).sqrt();
        let scale = L::splat(scale);
        for i in (0..n).step_by(LANES) {
            let v = L::load(x.add(i)).mul(scale).mul(L::load(weight.add(i)));
            v.store(out.add(i));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{isas, random};

    #[test]
    fn follows_the_definition_with_the_same_bits_everywhere() {
        for n in [16, 64, 576, 896] {
            let (x, w) = (random(n, 1), random(n, 2));
            let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            let mut first = vec![0.0; n];
            rms_norm(Isa::Scalar, &x, &w, 1e-5, &mut first);
            for i in 0..n {
                let exact = f64::from(x[i]) * scale * f64::from(w[i]);
                assert!((f64::from(first[i]) - exact).abs() <= 1e-6 * exact.abs().max(1e-3));
            }
            for isa in isas() {
                let mut out = vec![0.0; n];
                rms_norm(isa, &x, &w, 1e-5, &mut out);
                assert_eq!(out, first, "{isa:?}");
                let mut out = x.clone();
                rms_norm_in_place(isa, &mut out, &w, 1e-5);
                assert_eq!(out, first, "{isa:?}");
            }
        }
    }
}
