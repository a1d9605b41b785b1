//! Log-probabilities, from the logits as the model made them.

use shoal_core::TokenId;
use shoal_kernels::Isa;
use shoal_kernels::logits::total_weight;

use super::{SampleError, Sampler, rows};
use crate::request::Logprob;

impl Sampler {
    /// The log-probability of `token`, and the `top` most likely tokens.
    ///
    /// `logit - max - ln(sum of e^(logit - max))`: blocks of 64 are summed in 16 lanes of f32,
    /// the blocks in f64, in order. `maxima` as for [`draw`](Self::draw).
    pub(crate) fn logprob(
        &mut self,
        logits: &[f32],
        maxima: &[f32],
        token: TokenId,
        top: u32,
    ) -> Result<Logprob, SampleError> {
        self.take_maxima(logits, maxima);
        let max = rows::greatest(&self.block_max)?;
        let normaliser = f64::from(max) + libm::log(total_weight(Isa::detect(), logits, max, 1.0));
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
