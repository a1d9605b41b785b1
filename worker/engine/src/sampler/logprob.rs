//! Log-probabilities, from the logits as the model made them.

use shoal_core::TokenId;

use super::truncate::total_weight;
use super::{SampleError, Sampler, rows};
use crate::request::Logprob;

impl Sampler {
    /// The log-probability of `token`, and the `top` most likely tokens.
    ///
    /// `logit - max - ln(sum of e^(logit - max))`: blocks of 64 are summed in 16 lanes of f32,
    /// the blocks in f64, in order.
    pub(crate) fn logprob(
        &mut self,
        logits: &[f32],
        token: TokenId,
        top: u32,
    ) -> Result<Logprob, SampleError> {
        let max = rows::block_maxima(logits, &mut self.block_max)?;
        let normaliser = f64::from(max) + libm::log(total_weight(logits, max, 1.0));
        let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
        let best = self.truncation.best(logits, &self.block_max, top as usize);
        Ok(Logprob {
            logprob: Some(logprob(logits[token as usize])),
            top: best
                .iter()
                .map(|candidate| (candidate.token(), logprob(candidate.logit())))
                .collect(),
        })
    }
}
