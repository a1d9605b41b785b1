//! The exponential race: the token with the least `E / w` wins, the lowest id on a tie.

use shoal_core::{NoiseKey, TokenId};
use shoal_kernels::Isa;
use shoal_kernels::logits::{BLOCK, Noise, exp_neg, least_costs};

/// Below log2 of every uniform number.
const LOG2_LEAST_UNIFORM: f32 = -33.1;
/// Covers every rounding in the bound below, with room to spare.
const SLACK: f32 = 0.01;

/// A race between tokens of one row.
#[derive(Debug)]
pub(super) struct Race {
    key: NoiseKey,
    max: f32,
    inverse_temperature: f32,
    min_p: f32,
    best: (f32, TokenId),
    /// Scores whose log2 is surely above this lose.
    log2_best: f32,
}

/// 1 / temperature, finite for the smallest temperature too.
pub(super) fn inverse(temperature: f32) -> f32 {
    (1.0 / temperature).min(f32::MAX)
}

impl Race {
    /// A race at `temperature` over a row whose largest logit is `max`. Tokens of less than
    /// `min_p` of its probability do not run.
    pub(super) fn new(key: NoiseKey, max: f32, temperature: f32, min_p: f32) -> Self {
        Self {
            key,
            max,
            inverse_temperature: inverse(temperature),
            min_p,
            best: (f32::INFINITY, TokenId::MAX),
            log2_best: f32::INFINITY,
        }
    }

    /// The winner among those entered; there must be one of weight above 0.
    pub(super) fn winner(&self) -> TokenId {
        self.best.1
    }

    /// Enters one token.
    pub(super) fn enter(&mut self, token: TokenId, logit: f32) {
        let weight = exp_neg((logit - self.max) * self.inverse_temperature);
        if weight == 0.0 || weight < self.min_p {
            return;
        }
        // The uniform bounds the exponential from below and needs no logarithm.
        if self.key.uniform(token) > self.best.0 * weight * (1.0 + SLACK) {
            return;
        }
        let entry = (self.key.exponential(token) / weight, token);
        if entry < self.best {
            self.best = entry;
            self.log2_best = libm::log2f(entry.0) + SLACK;
        }
    }

    /// Enters every token of a row with these block maxima. Someone must have been entered
    /// already.
    ///
    /// Neither exp nor log is taken of most: with `U <= E`, a token loses surely if
    /// `log2 U - log2 w` is above the logarithm of the best score, where log2 U is bounded
    /// from below by its float's bits and log2 w is linear in the logit. A block whose largest
    /// logit would lose with the least noise, or is below `min_p`, is not even looked at.
    pub(super) fn enter_all(&mut self, logits: &[f32], block_max: &[f32]) {
        let scale = (self.inverse_temperature * std::f32::consts::LOG2_E).min(f32::MAX);
        let (key, max, isa) = (self.key, self.max, Isa::detect());
        let min_p_bound = SLACK - libm::log2f(self.min_p);
        let (blocks, rest) = logits.as_chunks::<BLOCK>();
        let mut costs = [0.0; BLOCK];
        for (index, block) in blocks.iter().enumerate() {
            let start = index * BLOCK;
            let cost = (max - block_max[index]) * scale;
            if cost > min_p_bound || cost + LOG2_LEAST_UNIFORM > self.log2_best {
                continue;
            }
            let noise = Noise {
                key,
                first: start as TokenId,
            };
            if least_costs(isa, noise, block, (max, scale), &mut costs) > self.log2_best {
                continue;
            }
            for (i, (&logit, &cost)) in block.iter().zip(&costs).enumerate() {
                if cost <= self.log2_best {
                    self.enter((start + i) as TokenId, logit);
                }
            }
        }
        let start = blocks.len() * BLOCK;
        for (i, &logit) in rest.iter().enumerate() {
            self.enter((start + i) as TokenId, logit);
        }
    }
}
