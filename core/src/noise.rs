//! Counter-based sampling noise.
//!
//! The noise of a token is a pure function of (seed, choice, absolute output position,
//! token): it has no state to lose. So a request sampled again, on another worker, in
//! another batch, after a preemption, meets the same noise; and verifying a draft is
//! nothing but sampling.
//!
//! Sampling is an exponential race, which is Gumbel-max without its outer logarithm:
//! with independent `E_i ~ Exp(1)` and weights `w_i`, the index of the least `E_i / w_i`
//! is distributed as `w_i / sum(w)`.

use crate::TokenId;

/// The noise of one output position of one choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    a: u32,
    b: u32,
}

impl NoiseKey {
    /// The key of output position `position` (0 is the first output token) of choice `choice`.
    pub fn new(seed: u64, choice: u32, position: u32) -> Self {
        let place = (u64::from(choice) << 32) | u64::from(position);
        let key = mix64(mix64(seed ^ 0x5368_6f61_6c2d_7631).wrapping_add(place));
        Self {
            a: key as u32,
            b: (key >> 32) as u32,
        }
    }

    /// A uniform number in (0, 1), with full relative precision near 0.
    ///
    /// It bounds [`exponential`](Self::exponential) from below, so a race may skip the
    /// logarithm of every token that this already rules out.
    #[inline]
    pub fn uniform(self, token: TokenId) -> f32 {
        let bits = mix32(mix32(token.wrapping_mul(0x9e37_79b9) ^ self.a) ^ self.b);
        // 2^-32 steps, from the middle of the first; the last value rounds below 1.
        ((bits as f32) + 0.5) * (1.0 / 4_294_967_808.0)
    }

    /// An `Exp(1)` number: `-ln(1 - uniform)`.
    #[inline]
    pub fn exponential(self, token: TokenId) -> f32 {
        -libm::log1pf(-self.uniform(token))
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix64(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A bijection of 32 bits with low bias (Wellons, "hash-prospector", lowbias32).
#[inline]
fn mix32(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pinned: a change here changes every sampled answer and must change the numerics version.
    #[test]
    fn pinned_values() {
        let bits: Vec<u32> = (0..4)
            .map(|t| NoiseKey::new(42, 0, 7).uniform(t).to_bits())
            .collect();
        assert_eq!(bits, [1046479395, 1063413990, 1064961600, 1057645304]);
    }

    #[test]
    fn bounds_hold() {
        for position in 0..64 {
            let key = NoiseKey::new(9, 1, position);
            for token in 0..4096 {
                let (u, e) = (key.uniform(token), key.exponential(token));
                assert!(u > 0.0 && u < 1.0);
                assert!(e.is_finite() && e >= u);
            }
        }
    }

    #[test]
    fn positions_and_choices_differ() {
        let base = NoiseKey::new(1, 0, 0);
        for other in [
            NoiseKey::new(2, 0, 0),
            NoiseKey::new(1, 1, 0),
            NoiseKey::new(1, 0, 1),
        ] {
            let same = (0..1000)
                .filter(|&t| base.uniform(t) == other.uniform(t))
                .count();
            assert!(same < 3);
        }
    }

    /// The race picks token i with probability w_i / sum(w): chi-square, 3 degrees of freedom.
    #[test]
    fn race_follows_the_weights() {
        let weights = [0.5f32, 0.25, 0.15, 0.1];
        let n = 100_000;
        let mut counts = [0u32; 4];
        for position in 0..n {
            let key = NoiseKey::new(1234, 0, position);
            let best = (0..4u32)
                .min_by(|&i, &j| {
                    let score = |t: u32| key.exponential(t) / weights[t as usize];
                    score(i).total_cmp(&score(j))
                })
                .unwrap();
            counts[best as usize] += 1;
        }
        let chi: f64 = counts
            .iter()
            .zip(weights)
            .map(|(&c, w)| {
                let expected = f64::from(w) * f64::from(n);
                (f64::from(c) - expected).powi(2) / expected
            })
            .sum();
        assert!(chi < 16.3, "chi-square {chi}, counts {counts:?}");
    }
}
