//! From a row of logits to a token, as [`Sampling`] defines it.
//!
//! A token is drawn by an exponential race (see [`shoal_core::NoiseKey`]): its noise depends on
//! seed, choice, absolute output position and token alone, so nothing here has a state that a
//! preemption could lose. All arithmetic is done in a fixed order with no platform library, so
//! equal logits give equal tokens on every machine.

mod counts;
mod logprob;
mod math;
mod race;
mod rows;
mod truncate;

use shoal_core::{Class, NoiseKey, Sampling, TokenId};
use shoal_kernels::Isa;
use shoal_kernels::logits::{BLOCK, block_maxima};

pub use self::counts::Counts;
use self::race::Race;
use self::truncate::Truncation;

/// Why no token could be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The backend's logits hold a NaN or plus infinity.
    #[error("the logits hold a NaN or an infinity")]
    NotFinite,
    /// Every token is masked.
    #[error("no token is allowed")]
    NothingAllowed,
}

impl SampleError {
    /// What to do about it.
    pub fn class(self) -> Class {
        match self {
            Self::NotFinite => Class::Retry,
            Self::NothingAllowed => Class::Client,
        }
    }
}

/// What a draw needs beside the logits.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// How to draw.
    pub sampling: &'a Sampling,
    /// What penalties count.
    pub counts: &'a Counts,
    /// Tokens that may not be drawn.
    pub masked: &'a [TokenId],
    /// Absolute output position of the token to draw.
    pub position: u32,
}

/// Draws tokens and computes their log-probabilities. Holds scratch memory only.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Logits that a draw changed, with their old values.
    changed: Vec<(TokenId, f32)>,
    block_max: Vec<f32>,
    truncation: Truncation,
}

impl Sampler {
    /// Draws one token. The logits are as they were on return. `maxima` are those of their
    /// blocks; where they are empty, it finds them itself.
    ///
    /// # Errors
    /// When there is no token to draw.
    pub fn draw(
        &mut self,
        logits: &mut [f32],
        maxima: &[f32],
        draw: Draw<'_>,
    ) -> Result<TokenId, SampleError> {
        self.take_maxima(logits, maxima);
        adjust(logits, draw, &mut self.changed);
        for &(token, _) in &self.changed {
            let block = token as usize / BLOCK;
            let end = logits.len().min((block + 1) * BLOCK);
            let of_block = &mut self.block_max[block..=block];
            block_maxima(Isa::detect(), &logits[block * BLOCK..end], of_block);
        }
        let token = self.draw_adjusted(logits, draw);
        // Last change first, so that a token changed twice ends with its first value.
        while let Some((token, old)) = self.changed.pop() {
            logits[token as usize] = old;
        }
        token
    }

    fn take_maxima(&mut self, logits: &[f32], maxima: &[f32]) {
        if maxima.is_empty() {
            self.block_max.resize(logits.len().div_ceil(BLOCK), 0.0);
            block_maxima(Isa::detect(), logits, &mut self.block_max);
        } else {
            self.block_max.clear();
            self.block_max.extend_from_slice(maxima);
        }
    }

    fn draw_adjusted(&mut self, logits: &[f32], draw: Draw<'_>) -> Result<TokenId, SampleError> {
        let max = rows::greatest(&self.block_max)?;
        let sampling = draw.sampling;
        if sampling.temperature == 0.0 {
            return Ok(rows::first_of(logits, &self.block_max, max));
        }
        let key = NoiseKey::new(sampling.seed, sampling.choice, draw.position);
        let mut race = Race::new(key, max, sampling.temperature, sampling.min_p);
        if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            race.enter(rows::first_of(logits, &self.block_max, max), max);
            race.enter_all(logits, &self.block_max);
        } else {
            let kept = self.truncation.keep(logits, &self.block_max, max, sampling);
            for candidate in kept {
                race.enter(candidate.token(), candidate.logit());
            }
        }
        Ok(race.winner())
    }
}

/// Applies bias, penalties and mask, in the order of [`Sampling`], noting what it changes.
fn adjust(logits: &mut [f32], draw: Draw<'_>, changed: &mut Vec<(TokenId, f32)>) {
    let sampling = draw.sampling;
    let mut set = |token: TokenId, to: &dyn Fn(f32) -> f32| {
        let logit = &mut logits[token as usize];
        changed.push((token, *logit));
        *logit = to(*logit);
    };
    // A tiny penalty must not make an infinity of a logit.
    let finite = |old: f32, new: f32| match old.is_finite() {
        true => new.clamp(f32::MIN, f32::MAX),
        false => new,
    };
    for &(token, bias) in &sampling.logit_bias {
        set(token, &|logit| finite(logit, logit + bias));
    }
    for (token, in_output) in draw.counts.iter() {
        set(token, &|logit| {
            let repeated = if logit > 0.0 {
                logit / sampling.repetition_penalty
            } else {
                logit * sampling.repetition_penalty
            };
            if in_output == 0 {
                return finite(logit, repeated);
            }
            let frequency = sampling.frequency_penalty * in_output as f32;
            finite(logit, repeated - sampling.presence_penalty - frequency)
        });
    }
    for &token in draw.masked {
        set(token, &|_| f32::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests;
