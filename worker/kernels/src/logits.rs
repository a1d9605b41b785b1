//! Passes over a row of logits.

use shoal_core::{NoiseKey, TokenId};

use crate::Isa;
use crate::simd::{LANES, Lanes, dispatch};

/// Logits whose greatest is kept.
pub const BLOCK: usize = 64;

/// Writes the greatest of each [`BLOCK`] of logits, of the last as many as there are; NaN where
/// one is NaN.
///
/// # Panics
/// When there is not a place for every block.
pub fn block_maxima(isa: Isa, logits: &[f32], maxima: &mut [f32]) {
    assert_eq!(maxima.len(), logits.len().div_ceil(BLOCK));
    let (x, to) = ((logits.as_ptr(), 0), (maxima.as_mut_ptr(), 0));
    // SAFETY: one row, with a place for every block.
    unsafe { tile_maxima(isa, x, (1, logits.len()), to) };
}

/// [`block_maxima`] for a matrix of `(rows, columns)`, from where its rows begin to where their
/// maxima do, each with what lies between one row and the next.
///
/// # Safety
/// The logits are there, and a place for every block, which nobody else reads or writes.
pub(crate) unsafe fn tile_maxima(
    isa: Isa,
    x: (*const f32, usize),
    shape: (usize, usize),
    to: (*mut f32, usize),
) {
    // SAFETY: the contract of this function.
    dispatch!(isa, maxima_of::<_>(
        x: (*const f32, usize), shape: (usize, usize), to: (*mut f32, usize),
    ));
}

/// The sum of `e^((logit - max) * scale)`: blocks of [`BLOCK`] by lanes in f32, then block by
/// block in f64. Each term is [`exp_neg`].
pub fn total_weight(isa: Isa, logits: &[f32], max: f32, scale: f32) -> f64 {
    // SAFETY: a kernel of lanes.
    dispatch!(isa, total::<_>(logits: &[f32], max: f32, scale: f32) -> f64)
}

/// The noise of tokens one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    /// Of their output position.
    pub key: NoiseKey,
    /// The first token.
    pub first: TokenId,
}

/// Writes of every token of a block a number not above `log2(U / 2^((logit - max) * scale))`, less
/// roundings, where U is its uniform noise; gives the least.
pub fn least_costs(
    isa: Isa,
    noise: Noise,
    logits: &[f32; BLOCK],
    (max, scale): (f32, f32),
    costs: &mut [f32; BLOCK],
) -> f32 {
    // SAFETY: the kernel needs the features alone.
    dispatch!(isa, costs_of::<_>(
        noise: Noise, logits: &[f32; BLOCK], max: f32, scale: f32, costs: &mut [f32; BLOCK],
    ) -> f32)
}

/// e^x for x <= 0, to 2 units in the last place; 0 from -87 down. NaN gives 0.
///
/// The range is reduced by multiples of ln 2 in two parts (Cody and Waite 1980); the rest is
/// the Taylor series to degree 7, which on |r| <= ln(2)/2 is off by less than 2^-27.
pub fn exp_neg(x: f32) -> f32 {
    use crate::simd::Scalar;
    // SAFETY: the scalar lanes need no features.
    unsafe { exp::<Scalar>(Scalar([x; LANES])).0[0] }
}

/// # Safety
/// See [`Lanes`] and [`tile_maxima`].
#[inline(always)]
unsafe fn maxima_of<L: Lanes>(
    (x, x_stride): (*const f32, usize),
    (rows, columns): (usize, usize),
    (to, to_stride): (*mut f32, usize),
) {
    // SAFETY: the contract of this function.
    unsafe {
        let (lowest, one) = (L::splat(f32::NEG_INFINITY), L::splat(1.0));
        for row in 0..rows {
            for (block, first) in (0..columns).step_by(BLOCK).enumerate() {
                let x = x.add(row * x_stride + first);
                let n = BLOCK.min(columns - first);
                let (mut max, mut numbers) = (lowest, L::splat(0.0));
                for i in (0..n / LANES * LANES).step_by(LANES) {
                    let x = L::load(x.add(i));
                    max = x.max(max);
                    numbers = numbers.add(one.where_ge(x, lowest));
                }
                let mut top = max.maximum();
                if numbers.sum() != (n / LANES * LANES) as f32 {
                    top = f32::NAN;
                }
                for i in n / LANES * LANES..n {
                    let x = *x.add(i);
                    if x.is_nan() || x > top {
                        top = x;
                    }
                }
                *to.add(row * to_stride + block) = top;
            }
        }
    }
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn total<L: Lanes>(logits: &[f32], max: f32, scale: f32) -> f64 {
    let (blocks, rest) = logits.as_chunks::<BLOCK>();
    let mut total = 0.0;
    // SAFETY: the contract of this function.
    unsafe {
        let (top, factor) = (L::splat(max), L::splat(scale));
        for block in blocks {
            let mut sums = L::splat(0.0);
            for vector in block.as_chunks::<LANES>().0 {
                let x = L::load(vector.as_ptr()).sub(top).mul(factor);
                sums = sums.add(exp::<L>(x));
            }
            let mut lanes = [0.0; LANES];
            sums.store(lanes.as_mut_ptr());
            total += f64::from(lanes.iter().fold(0.0, |a, &b| a + b));
        }
    }
    for &logit in rest {
        total += f64::from(exp_neg((logit - max) * scale));
    }
    total
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn costs_of<L: Lanes>(
    noise: Noise,
    logits: &[f32; BLOCK],
    max: f32,
    scale: f32,
    costs: &mut [f32; BLOCK],
) -> f32 {
    let mut least = [f32::INFINITY; LANES];
    let (vectors, _) = logits.as_chunks::<LANES>();
    let (outs, _) = costs.as_chunks_mut::<LANES>();
    for (v, (vector, out)) in vectors.iter().zip(outs).enumerate() {
        for i in 0..LANES {
            let token = noise.first + (v * LANES + i) as TokenId;
            let cost = log2_below(noise.key.uniform(token)) - (vector[i] - max) * scale;
            out[i] = cost;
            least[i] = if cost < least[i] { cost } else { least[i] };
        }
    }
    least.into_iter().fold(f32::INFINITY, f32::min)
}

/// A number not above log2(x) for normal positive x, and at most 0.0861 below: the mantissa
/// taken as linear.
#[inline(always)]
fn log2_below(x: f32) -> f32 {
    (x.to_bits() as i32 as f32) * (1.0 / 8_388_608.0) - 127.0
}

/// [`exp_neg`] of every lane. Unlike the `exp` of the activations it fuses no multiply-add, which
/// in [`exp_neg`] would be a call of the math library.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn exp<L: Lanes>(x: L) -> L {
    const LOWEST: f32 = -87.0;
    /// Adding and subtracting it rounds a small float to an integer: 1.5 * 2^23.
    const ROUNDER: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: the contract of this function.
    unsafe {
        let clamped = x.max(L::splat(LOWEST));
        let log2 = clamped.mul(L::splat(std::f32::consts::LOG2_E));
        let n = log2.add(L::splat(ROUNDER)).sub(L::splat(ROUNDER));
        let r = clamped.sub(n.mul(L::splat(LN_2_HIGH)));
        let r = r.sub(n.mul(L::splat(LN_2_LOW)));
        let mut p = L::splat(1.0 / 5040.0);
        for coefficient in [
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
            1.0,
        ] {
            p = p.mul(r).add(L::splat(coefficient));
        }
        p.mul(n.exp2i()).where_ge(x, L::splat(LOWEST.next_up()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{isas, random};

    #[test]
    fn maxima_are_of_their_blocks() {
        for n in [1, 15, 64, 65, 200, 4096] {
            let mut x = random(n, n as u64);
            for bad in [None, Some(n / 2)] {
                if let Some(bad) = bad {
                    x[bad] = f32::NAN;
                }
                for isa in isas() {
                    let mut got = vec![0.0; n.div_ceil(BLOCK)];
                    block_maxima(isa, &x, &mut got);
                    for (block, got) in x.chunks(BLOCK).zip(got) {
                        let nan = block.iter().any(|x| x.is_nan());
                        let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        assert!(if nan { got.is_nan() } else { got == max }, "{isa:?} {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_masked_row_has_no_greatest() {
        for isa in isas() {
            let mut got = [0.0; 2];
            block_maxima(isa, &[f32::NEG_INFINITY; 70], &mut got);
            assert_eq!(got, [f32::NEG_INFINITY; 2]);
        }
    }

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
        assert!(exp_neg((-87.0f32).next_up()) >= f32::MIN_POSITIVE);
        for x in [-87.0, -87.5, f32::MIN, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp_neg(x), 0.0);
        }
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
    fn costs_bound_the_scores() {
        let noise = Noise {
            key: NoiseKey::new(3, 1, 5),
            first: 640,
        };
        let logits: [f32; BLOCK] = random(BLOCK, 11).try_into().unwrap();
        for isa in isas() {
            let mut costs = [0.0; BLOCK];
            let least = least_costs(isa, noise, &logits, (1.0, 2.5), &mut costs);
            assert_eq!(least, costs.iter().copied().fold(f32::INFINITY, f32::min));
            for (token, (&logit, cost)) in (noise.first..).zip(logits.iter().zip(costs)) {
                let uniform = f64::from(noise.key.uniform(token)).log2();
                let exact = uniform - f64::from(logit - 1.0) * 2.5;
                let cost = f64::from(cost);
                assert!(
                    cost <= exact + 1e-4 && cost > exact - 0.0863,
                    "{isa:?} {token}"
                );
            }
        }
    }

    #[test]
    fn totals_have_the_same_bits_everywhere() {
        for n in [1, 64, 100, 5000] {
            let x: Vec<f32> = random(n, 7).iter().map(|x| 50.0 * x).collect();
            let exact: f64 = x.iter().map(|&x| (f64::from(x - 50.0) * 0.5).exp()).sum();
            let first = total_weight(Isa::Scalar, &x, 50.0, 0.5);
            assert!((first - exact).abs() <= 1e-6 * exact);
            for isa in isas() {
                assert_eq!(total_weight(isa, &x, 50.0, 0.5).to_bits(), first.to_bits());
            }
        }
    }
}
