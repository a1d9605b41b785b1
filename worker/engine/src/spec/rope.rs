//! Rotary position embedding and its context extensions, resolved to frequencies.

use std::f64::consts::TAU;

/// Which elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// Elements 2i and 2i+1.
    Interleaved,
    /// Elements i and i + dims/2 (GPT-NeoX).
    Halves,
}

/// Rotary position embedding (Su et al. 2021), every scaling resolved to plain frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Pairing of the elements.
    pub kind: RopeKind,
    /// Radians per position of each pair; pairs beyond these do not rotate.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine (YaRN's attention factor); 1 otherwise.
    pub magnitude: f32,
}

/// How a model stretches the positions it was first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scaling {
    /// Positions divided by `factor` (Chen et al. 2023); 1 leaves them alone.
    Linear { factor: f64 },
    /// YaRN (Peng et al. 2023): fast pairs keep their frequency, slow ones are interpolated.
    Yarn {
        factor: f64,
        original_context: f64,
        beta_fast: f64,
        beta_slow: f64,
    },
}

/// What a file says about its rotation.
#[derive(Clone, Debug)]
pub(super) struct RopeConfig {
    pub(super) kind: RopeKind,
    /// Elements of a head that rotate; even.
    pub(super) dims: usize,
    pub(super) base: f64,
    pub(super) scaling: Scaling,
    /// Multiplies the magnitude.
    pub(super) attention_factor: f64,
    /// One per pair, dividing its frequency (`rope_freqs.weight`: Llama 3.1's scaling).
    pub(super) divisors: Option<Vec<f32>>,
}

impl RopeConfig {
    /// The frequencies and the magnitude, as llama.cpp's `ggml_rope_ext` makes them.
    pub(super) fn resolve(&self) -> Rope {
        let inv_freq = (0..self.dims / 2)
            .map(|pair| {
                let divisor = self.divisors.as_ref().map_or(1.0, |d| f64::from(d[pair]));
                let trained = self.base.powf(-2.0 * pair as f64 / self.dims as f64) / divisor;
                self.stretched(pair, trained) as f32
            })
            .collect();
        let magnitude = match self.scaling {
            Scaling::Yarn { factor, .. } if factor > 1.0 => 1.0 + 0.1 * factor.ln(),
            _ => 1.0,
        };
        Rope {
            kind: self.kind,
            inv_freq,
            magnitude: (magnitude * self.attention_factor) as f32,
        }
    }

    fn stretched(&self, pair: usize, trained: f64) -> f64 {
        match self.scaling {
            Scaling::Linear { factor } => trained / factor,
            Scaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
            } => {
                let last = self.dims as f64 - 1.0;
                let low = self.pair_of(beta_fast, original_context).floor().max(0.0);
                let high = self.pair_of(beta_slow, original_context).ceil().min(last);
                let ramp = ((pair as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                trained * (1.0 - ramp) + trained / factor * ramp
            }
        }
    }

    /// The pair that turns `rotations` times over `context` positions.
    fn pair_of(&self, rotations: f64, context: f64) -> f64 {
        self.dims as f64 * (context / (rotations * TAU)).ln() / (2.0 * self.base.ln())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dims: usize, base: f64, scaling: Scaling) -> RopeConfig {
        RopeConfig {
            kind: RopeKind::Halves,
            dims,
            base,
            scaling,
            attention_factor: 1.0,
            divisors: None,
        }
    }

    fn assert_close(got: f32, want: f64) {
        assert!(
            (f64::from(got) - want).abs() <= want.abs() * 1e-6,
            "{got} is not {want}"
        );
    }

    #[test]
    fn plain_and_linear() {
        let plain = config(64, 10_000.0, Scaling::Linear { factor: 1.0 }).resolve();
        assert_eq!(plain.inv_freq.len(), 32);
        assert_eq!(plain.magnitude, 1.0);
        assert_close(plain.inv_freq[0], 1.0);
        assert_close(plain.inv_freq[16], 0.01);
        let linear = config(64, 10_000.0, Scaling::Linear { factor: 4.0 }).resolve();
        assert_close(linear.inv_freq[16], 0.0025);
    }

    /// Qwen2.5 at 128k (factor 4 over 32,768, base 1e6, 128 dims): the values that
    /// `transformers`' `_compute_yarn_parameters` gives, computed apart from this code.
    #[test]
    fn yarn_of_qwen2_5() {
        let yarn = config(
            128,
            1e6,
            Scaling::Yarn {
                factor: 4.0,
                original_context: 32_768.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
            },
        )
        .resolve();
        assert_close(yarn.magnitude, 1.138_629_436_111_989);
        for (pair, want) in YARN {
            assert_close(yarn.inv_freq[pair], want);
        }
    }

    const YARN: [(usize, f64); 7] = [
        (0, 1.000000000000e+00),
        (22, 8.659643233601e-03),
        (23, 6.978305848599e-03),
        (24, 5.375321490790e-03),
        (32, 6.029411764706e-04),
        (40, 4.445698525097e-05),
        (63, 3.102344401879e-07),
    ];

    /// The ends of YaRN: pairs that turn often keep their frequency, those that never turn once
    /// are interpolated; a factor of 1 changes nothing.
    #[test]
    fn yarn_keeps_the_fast_and_divides_the_slow() {
        let yarn = |factor| Scaling::Yarn {
            factor,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        };
        let plain = config(64, 1e4, Scaling::Linear { factor: 1.0 }).resolve();
        let stretched = config(64, 1e4, yarn(8.0)).resolve();
        for (pair, (&trained, &got)) in plain.inv_freq.iter().zip(&stretched.inv_freq).enumerate() {
            let turns = 4096.0 * trained / std::f32::consts::TAU;
            match turns {
                ..1.0 => assert_close(got * 8.0, f64::from(trained)),
                48.0.. => assert_close(got, f64::from(trained)),
                _ => assert!((trained / 8.0..=trained).contains(&got), "pair {pair}"),
            }
        }
        assert_eq!(config(64, 1e4, yarn(1.0)).resolve(), plain);
    }

    /// Where every pair is slow or every pair fast, the ramp has no room.
    #[test]
    fn yarn_of_extreme_contexts() {
        for (original_context, divided) in [(1.0, true), (1e30, false)] {
            let scaling = Scaling::Yarn {
                factor: 4.0,
                original_context,
                beta_fast: 32.0,
                beta_slow: 1.0,
            };
            let rope = config(16, 1e4, scaling).resolve();
            let plain = config(16, 1e4, Scaling::Linear { factor: 1.0 }).resolve();
            for (pair, (&got, &trained)) in rope.inv_freq.iter().zip(&plain.inv_freq).enumerate() {
                // The ramp begins with the first pair, which it leaves alone.
                let divisor = if divided && pair > 0 { 4.0 } else { 1.0 };
                assert_close(got * divisor, f64::from(trained));
            }
        }
    }

    /// Llama 3.1 (factor 8, low 1, high 4, over 8,192): its converter writes what each
    /// frequency is divided by.
    #[test]
    fn divisors_divide() {
        let mut rope = config(4, 500_000.0, Scaling::Linear { factor: 1.0 });
        rope.divisors = Some(vec![1.0, 8.0]);
        rope.attention_factor = 1.5;
        let rope = rope.resolve();
        assert_close(rope.inv_freq[0], 1.0);
        assert_close(rope.inv_freq[1], 500_000f64.powf(-0.5) / 8.0);
        assert_eq!(rope.magnitude, 1.5);
    }
}
