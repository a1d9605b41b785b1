//! Rotary position embedding (Su et al. 2021).

use crate::Isa;
use crate::simd::{Lanes, dispatch};

/// Sines and cosines of one position: `table[i]` and `table[pairs + i]` are the cosine and
/// the sine of pair i, times `magnitude`.
///
/// # Panics
/// When the table is not twice as long as `inv_freq`.
pub fn fill_table(position: u32, inv_freq: &[f32], magnitude: f32, table: &mut [f32]) {
    assert_eq!(table.len(), 2 * inv_freq.len());
    let (cos, sin) = table.split_at_mut(inv_freq.len());
    for ((c, s), &freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
        let (sine, cosine) = libm::sincosf(position as f32 * freq);
        (*c, *s) = (cosine * magnitude, sine * magnitude);
    }
}

/// Rotates elements 2i and 2i+1 of one head.
///
/// # Panics
/// When the table has more pairs than the head.
pub fn rotate_interleaved(isa: Isa, head: &mut [f32], table: &[f32]) {
    // SAFETY: the kernel needs the features alone.
    dispatch!(isa, interleaved::<_>(head: &mut [f32], table: &[f32]));
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn interleaved<L: Lanes>(head: &mut [f32], table: &[f32]) {
    let pairs = table.len() / 2;
    let (cos, sin) = table.split_at(pairs);
    for ((pair, &c), &s) in head[..2 * pairs].chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
    }
}

/// Rotates elements i and i + pairs of one head (GPT-NeoX).
///
/// # Panics
/// When the table has more pairs than the head.
pub fn rotate_halves(isa: Isa, head: &mut [f32], table: &[f32]) {
    // SAFETY: the kernel needs the features alone.
    dispatch!(isa, halves::<_>(head: &mut [f32], table: &[f32]));
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn halves<L: Lanes>(head: &mut [f32], table: &[f32]) {
    let pairs = table.len() / 2;
    let (cos, sin) = table.split_at(pairs);
    let (low, high) = head[..2 * pairs].split_at_mut(pairs);
    for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{isas, random};

    #[test]
    fn rotations_turn_by_the_angle_and_keep_the_rest() {
        let inv_freq = [1.0f32, 0.1, 0.01];
        let mut table = [0.0; 6];
        fill_table(5, &inv_freq, 1.0, &mut table);
        let x = random(8, 3);
        let (mut norm, mut neox) = (x.clone(), x.clone());
        rotate_interleaved(Isa::Scalar, &mut norm, &table);
        rotate_halves(Isa::Scalar, &mut neox, &table);
        for isa in isas() {
            let (mut a, mut b) = (x.clone(), x.clone());
            rotate_interleaved(isa, &mut a, &table);
            rotate_halves(isa, &mut b, &table);
            assert!(a == norm && b == neox, "{isa:?}");
        }
        for (i, freq) in inv_freq.into_iter().enumerate() {
            let (sin, cos) = (5.0 * f64::from(freq)).sin_cos();
            for (out, a, b) in [(&norm, 2 * i, 2 * i + 1), (&neox, i, i + 3)] {
                let (u, v) = (f64::from(x[a]), f64::from(x[b]));
                assert!((f64::from(out[a]) - (u * cos - v * sin)).abs() < 1e-6);
                assert!((f64::from(out[b]) - (u * sin + v * cos)).abs() < 1e-6);
            }
        }
        assert_eq!(norm[6..], x[6..]);
        assert_eq!(neox[6..], x[6..]);
    }
}
