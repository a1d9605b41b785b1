//! Top-k and top-p: the most likely tokens, by logit, the lowest id first where equal.

use shoal_core::{Sampling, TokenId};
use shoal_kernels::Isa;
use shoal_kernels::logits::{BLOCK, exp_neg, total_weight};

use super::math::{from_order_bits, order_bits};
use super::race::inverse;

/// Candidates sorted at first; more only if their mass is not enough.
const FIRST_SORTED: usize = 128;

/// Nats below the most likely token, at temperature 1, of what top-p looks at first.
const SHALLOW: f32 = 6.0;

/// A token and its logit in one integer: the greater comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Candidate(u64);

impl Candidate {
    fn new(token: TokenId, logit: f32) -> Self {
        // Both zeros are one logit.
        Self((u64::from(order_bits(logit + 0.0)) << 32) | u64::from(!token))
    }

    /// The token.
    pub(super) fn token(self) -> TokenId {
        !(self.0 as u32)
    }

    /// Its logit.
    pub(super) fn logit(self) -> f32 {
        from_order_bits((self.0 >> 32) as u32)
    }
}

/// Selects the most likely tokens of a row. Holds scratch memory only.
#[derive(Debug, Default)]
pub(super) struct Truncation {
    candidates: Vec<Candidate>,
    maxima: Vec<f32>,
}

impl Truncation {
    /// The tokens that top-k and top-p leave. `block_max` and `max` are the row's.
    pub(super) fn keep(
        &mut self,
        logits: &[f32],
        block_max: &[f32],
        max: f32,
        sampling: &Sampling,
    ) -> &[Candidate] {
        let scale = inverse(sampling.temperature);
        let weight = |logit: f32| exp_neg((logit - max) * scale);
        let kept = match sampling.top_k as usize {
            0 => {
                let total = total_weight(Isa::detect(), logits, max, scale);
                // Tokens below this have together less mass than top-p leaves out.
                let share = (1.0 - f64::from(sampling.top_p)) * total / logits.len() as f64;
                let floor = max + (libm::log(share) / f64::from(scale)) as f32 - 1e-3;
                let mass = f64::from(sampling.top_p) * total;
                // Few tokens have most of the mass as a rule: the same ones, as the best are
                // counted first.
                self.gather(logits, block_max, floor.max(max - SHALLOW / scale));
                if let Some(kept) = nucleus(&mut self.candidates, weight, mass) {
                    return &self.candidates[..kept];
                }
                self.gather(logits, block_max, floor);
                nucleus(&mut self.candidates, weight, mass).unwrap_or(self.candidates.len())
            }
            k => {
                let k = self.top(logits, block_max, k);
                if sampling.top_p < 1.0 {
                    let kept = &mut self.candidates[..k];
                    kept.sort_unstable_by(|a, b| b.cmp(a));
                    let total: f64 = kept.iter().map(|c| f64::from(weight(c.logit()))).sum();
                    nucleus(kept, weight, f64::from(sampling.top_p) * total).unwrap_or(k)
                } else {
                    k
                }
            }
        };
        &self.candidates[..kept]
    }

    /// The `n` most likely tokens, best first.
    pub(super) fn best(&mut self, logits: &[f32], block_max: &[f32], n: usize) -> &[Candidate] {
        let n = self.top(logits, block_max, n);
        let best = &mut self.candidates[..n];
        best.sort_unstable_by(|a, b| b.cmp(a));
        best
    }

    /// Puts the `k` most likely tokens first, in any order; fewer if the row is shorter.
    fn top(&mut self, logits: &[f32], block_max: &[f32], k: usize) -> usize {
        let k = k.min(logits.len());
        if k == 0 {
            return 0;
        }
        // At least k logits are not below the k-th largest block maximum.
        let floor = if k <= block_max.len() {
            self.maxima.clear();
            self.maxima.extend_from_slice(block_max);
            let (_, &mut kth, _) = self
                .maxima
                .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            kth
        } else {
            f32::NEG_INFINITY
        };
        self.gather(logits, block_max, floor);
        if k < self.candidates.len() {
            self.candidates
                .select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        }
        k
    }

    /// Collects every token whose logit is not below `floor`.
    fn gather(&mut self, logits: &[f32], block_max: &[f32], floor: f32) {
        self.candidates.clear();
        for (index, block) in logits.chunks(BLOCK).enumerate() {
            if block_max[index] < floor {
                continue;
            }
            let start = (index * BLOCK) as TokenId;
            for (token, &logit) in (start..).zip(block) {
                if logit >= floor {
                    self.candidates.push(Candidate::new(token, logit));
                }
            }
        }
    }
}

/// Sorts the best candidates, and gives the number of them whose mass first reaches `mass`, if
/// all together do. Weights are added best first.
fn nucleus(candidates: &mut [Candidate], weight: impl Fn(f32) -> f32, mass: f64) -> Option<usize> {
    let mut sorted = 0;
    let mut sum = 0.0;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let next = (sorted * 3).max(FIRST_SORTED).min(rest.len());
        if next < rest.len() {
            rest.select_nth_unstable_by(next - 1, |a, b| b.cmp(a));
        }
        rest[..next].sort_unstable_by(|a, b| b.cmp(a));
        for (i, candidate) in rest[..next].iter().enumerate() {
            sum += f64::from(weight(candidate.logit()));
            if sum >= mass {
                return Some(sorted + i + 1);
            }
        }
        sorted += next;
    }
    None
}
