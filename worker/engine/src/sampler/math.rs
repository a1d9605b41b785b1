//! Elementary functions with the same bits on every machine, in a form that compilers turn
//! into vector code.

/// Adding and subtracting it rounds a small float to an integer, which then stands in the low
/// bits: 1.5 * 2^23.
const ROUNDER: f32 = 12_582_912.0;
/// Below it, exp is taken to be 0: the result would not be a normal float.
const LOWEST: f32 = -87.0;

/// e^x for x <= 0, to 2 units in the last place; 0 below -87. NaN gives 0.
///
/// The range is reduced by multiples of ln 2 in two parts (Cody and Waite 1980); the rest is
/// the Taylor series to degree 7, which on |r| <= ln(2)/2 is off by less than 2^-27.
#[inline(always)]
pub(super) fn exp_neg(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LOWEST { x } else { LOWEST };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + coefficient;
    }
    // n stands in the low bits of `rounded`: add it to the exponent.
    let scaled = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x > LOWEST { scaled } else { 0.0 }
}

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
    fn exp_is_close_everywhere() {
        let mut worst = 0.0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_neg(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp_neg(0.0), 1.0);
        assert_eq!(exp_neg(-87.5), 0.0);
        assert_eq!(exp_neg(f32::MIN), 0.0);
        assert_eq!(exp_neg(f32::NEG_INFINITY), 0.0);
    }

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
