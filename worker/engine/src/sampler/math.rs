//! Elementary functions with the same bits on every machine, in a form that compilers turn
//! into vector code.

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
