//! Elementary functions on lanes, with one sequence of operations on every instruction set.

use crate::simd::Lanes;

/// e^x to about 1 ulp for x in [-87, 88]; 0 below, clamped above; 0 for -inf.
///
/// Cody–Waite reduction by ln 2 in two parts, then a degree-6 polynomial (Cephes `expf`).
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    const LOW: f32 = -87.0;
    // SAFETY: the caller runs with the features of `L`.
    unsafe {
        // `max` returns its second operand on NaN: the constant goes first, so NaN survives.
        let clamped = L::splat(88.0).min(L::splat(LOW).max(x));
        let n = clamped.mul(L::splat(std::f32::consts::LOG2_E)).round();
        let r = n.fma(L::splat(-355.0 / 512.0), clamped);
        let r = n.fma(L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(1.987_569_1e-4);
        for c in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = p.fma(r, L::splat(c));
        }
        let p = p.fma(r.mul(r), r).add(L::splat(1.0));
        p.mul(n.exp2i()).where_ge(x, L::splat(LOW))
    }
}

/// 2^x to about 1 ulp for x in [-126, 0]; 0 below.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp2<L: Lanes>(x: L) -> L {
    const LOW: f32 = -126.0;
    // SAFETY: the caller runs with the features of `L`.
    unsafe {
        let clamped = x.max(L::splat(LOW));
        let n = clamped.round();
        let r = clamped.sub(n);
        // Cephes `exp2f`.
        let mut p = L::splat(1.535_336_2e-4);
        for c in [
            1.339_887_4e-3,
            9.618_437e-3,
            5.550_332_5e-2,
            2.402_264_8e-1,
            6.931_472e-1,
            1.0,
        ] {
            p = p.fma(r, L::splat(c));
        }
        p.mul(n.exp2i()).where_ge(x, L::splat(LOW))
    }
}

/// x · sigmoid(x).
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn silu<L: Lanes>(x: L) -> L {
    // SAFETY: the caller runs with the features of `L`.
    unsafe { x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x)))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{LANES, Scalar};

    #[test]
    fn powers_of_two_are_close() {
        // SAFETY: the scalar lanes need no features.
        let of = |x: f32| unsafe { exp2(Scalar([x; LANES])).0[0] };
        for i in 0..126_000 {
            let x = -(i as f32) * 1e-3;
            let exact = f64::from(x).exp2();
            assert!((f64::from(of(x)) - exact).abs() <= 2e-7 * exact, "{x}");
        }
        assert_eq!(of(0.0), 1.0);
        for x in [-126.1, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(of(x), 0.0);
        }
    }
}
