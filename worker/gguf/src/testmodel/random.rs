//! Reproducible random weights: a file is a function of its recipe, on every machine and
//! with every version of every dependency.

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) struct Random {
    state: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Nearly normal numbers around 0: sums of four uniform ones, so none is beyond
    /// `deviation * sqrt(12)`.
    pub(super) fn normals(&mut self, len: usize, deviation: f32) -> Vec<f32> {
        // A 16-bit uniform number has a variance of 2^32 / 12, four of them 2^32 / 3.
        let scale = deviation * 3f32.sqrt() / 65_536.0;
        (0..len)
            .map(|_| {
                let x = self.next();
                let sum: u64 = (0..4).map(|i| (x >> (16 * i)) & 0xffff).sum();
                (sum as f32 - 131_070.0) * scale
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_moments_are_right() {
        let n = 100_000;
        let numbers = Random::new(7).normals(n, 2.0);
        let mean = numbers.iter().sum::<f32>() / n as f32;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / n as f32;
        assert!(mean.abs() < 0.03, "mean {mean}");
        assert!((variance - 4.0).abs() < 0.1, "variance {variance}");
    }
}
