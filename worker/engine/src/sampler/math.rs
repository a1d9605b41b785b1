//! Elementary functions with the same bits on every machine, in a form that compilers turn
//! into vector code.

/// A number not above log2(x) for normal positive x, and at most 0.0861 below: the mantissa
/// taken as linear.
#[inline(always)]
pub(super) fn log2_below(x: f32) -> f32 {
    (x.to_bits() as i32 as f32) * (1.0 / 8_388_608.0) - 127.0
}

/// An integer that orders as the float does; NaN aside.
#[inline(always)]
pub(super) fn order_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    bits ^ ((((bits as i32) >> 31) as u32) | 0x8000_0000)
}

/// The float of [`order_bits`].
#[inline(always)]
pub(super) fn from_order_bits(bits: u32) -> f32 {
    let mask = if bits & 0x8000_0000 != 0 {
        0x8000_0000
    } else {
        u32::MAX
    };
    f32::from_bits(bits ^ mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_bound_holds() {
        for i in 1..200_000u32 {
            let x = (i as f32) * 1.7e-5;
            let (bound, exact) = (f64::from(log2_below(x)), f64::from(x).log2());
            assert!(bound <= exact + 1e-5 && bound > exact - 0.0862, "{x}");
        }
    }

    #[test]
    fn order_bits_order() {
        let sorted = [
            f32::NEG_INFINITY,
            -3.0,
            -1e-30,
            0.0,
            1e-30,
            2.0,
            f32::INFINITY,
        ];
        assert!(
            sorted
                .windows(2)
                .all(|w| order_bits(w[0]) < order_bits(w[1]))
        );
        assert!(sorted.iter().all(|&x| from_order_bits(order_bits(x)) == x));
    }
}
