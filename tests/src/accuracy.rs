//! How close one backend's next-token distributions are to another's.

use shoal_core::{Role, TokenId};
use shoal_engine::backend::{Backend, BackendError};

use crate::drive::{Sequence, append, max_chunk};

/// Natural logarithms of the softmax of `logits`.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    let log_sum = max + sum.ln();
    logits.iter().map(|&l| f64::from(l) - log_sum).collect()
}

/// The two most likely tokens, best first.
pub fn top2(logprobs: &[f64]) -> [usize; 2] {
    let mut best = [0, 1];
    if logprobs[1] > logprobs[0] {
        best = [1, 0];
    }
    for (token, &logprob) in logprobs.iter().enumerate().skip(2) {
        if logprob > logprobs[best[0]] {
            best = [token, best[0]];
        } else if logprob > logprobs[best[1]] {
            best[1] = token;
        }
    }
    best
}

/// A comparison over the positions of a text.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    positions: usize,
    kl: f64,
    same_top: usize,
    /// Where the reference was sure and the other chose differently: position and margin.
    clear_misses: Vec<(usize, f64)>,
    scored: usize,
    reference_loss: f64,
    tested_loss: f64,
}

/// How close is close enough.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most mean Kullback-Leibler divergence from the reference, in nats.
    pub mean_kl: f64,
    /// Least share of positions whose most likely token is the same.
    pub top1: f64,
    /// Most relative difference of the perplexities.
    pub perplexity: f64,
}

/// Margin of the two best tokens, in nats, from which on the choice must be the same.
const CLEAR_MARGIN: f64 = 0.5;

impl Comparison {
    /// Runs `tokens` through both backends as one sequence. Logits are compared chunk by
    /// chunk, so that memory does not grow with the text.
    pub fn run(
        reference: &mut dyn Backend,
        tested: &mut dyn Backend,
        tokens: &[TokenId],
        role: Role,
    ) -> Result<Self, BackendError> {
        let vocab = reference.spec().vocab;
        let chunk = max_chunk(reference).min(max_chunk(tested));
        let mut sequences = [&*reference, &*tested].map(Sequence::scattered);
        let mut comparison = Self::default();
        for (start, part) in (0..).step_by(chunk).zip(tokens.chunks(chunk)) {
            let [ours, theirs] = &mut sequences;
            let expected = append(reference, ours, part, role)?;
            let got = append(tested, theirs, part, role)?;
            for (i, (p, q)) in expected.chunks(vocab).zip(got.chunks(vocab)).enumerate() {
                comparison.add(p, q, tokens.get(start + i + 1).copied());
            }
        }
        Ok(comparison)
    }

    /// Counts one position, which `next` follows.
    pub fn add(&mut self, reference: &[f32], tested: &[f32], next: Option<TokenId>) {
        let (p, q) = (log_softmax(reference), log_softmax(tested));
        self.kl += p
            .iter()
            .zip(&q)
            .map(|(p, q)| p.exp() * (p - q))
            .sum::<f64>();
        let [best, second] = top2(&p);
        let margin = p[best] - p[second];
        if top2(&q)[0] == best {
            self.same_top += 1;
        } else if margin > CLEAR_MARGIN {
            self.clear_misses.push((self.positions, margin));
        }
        if let Some(next) = next {
            self.scored += 1;
            self.reference_loss -= p[next as usize];
            self.tested_loss -= q[next as usize];
        }
        self.positions += 1;
    }

    /// Mean divergence from the reference, in nats.
    pub fn mean_kl(&self) -> f64 {
        self.kl / self.positions as f64
    }

    /// Share of positions with the same most likely token.
    pub fn top1(&self) -> f64 {
        self.same_top as f64 / self.positions as f64
    }

    /// Perplexity of the text, to the reference and to the other.
    pub fn perplexities(&self) -> [f64; 2] {
        [self.reference_loss, self.tested_loss].map(|loss| (loss / self.scored as f64).exp())
    }

    /// # Panics
    /// Where it is outside the bounds.
    pub fn assert_within(&self, bounds: &Bounds) {
        let [reference, tested] = self.perplexities();
        let report = format!(
            "mean KL {:.5}, top-1 {:.2} %, perplexity {tested:.4} against {reference:.4}, over {} positions",
            self.mean_kl(),
            100.0 * self.top1(),
            self.positions,
        );
        println!("{report}");
        // Written so that NaN is out of bounds.
        assert!(self.mean_kl() <= bounds.mean_kl, "KL: {report}");
        assert!(self.top1() >= bounds.top1, "top-1: {report}");
        assert!(
            (tested / reference - 1.0).abs() <= bounds.perplexity,
            "perplexity: {report}"
        );
        assert!(
            self.clear_misses.is_empty(),
            "clear choices differ: {:?}",
            self.clear_misses
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_known_distributions() {
        // Softmax (0.5, 0.25, 0.25) against (0.25, 0.5, 0.25).
        let (p, q) = ([2f32.ln(), 0.0, 0.0], [0.0, 2f32.ln(), 0.0]);
        let mut comparison = Comparison::default();
        comparison.add(&p, &q, Some(0));
        comparison.add(&p, &p, None);
        assert!((comparison.mean_kl() - 0.25 * 2f64.ln() / 2.0).abs() < 1e-6);
        assert_eq!(comparison.top1(), 0.5);
        assert_eq!(comparison.perplexities().map(|p| p.round()), [2.0, 4.0]);
        assert_eq!(comparison.clear_misses.len(), 1);
    }

    #[test]
    #[should_panic(expected = "KL")]
    fn nan_is_out_of_bounds() {
        let mut comparison = Comparison::default();
        comparison.add(&[f32::NAN, 0.0], &[0.0, 0.0], Some(0));
        let bounds = Bounds {
            mean_kl: 1.0,
            top1: 0.0,
            perplexity: 1.0,
        };
        comparison.assert_within(&bounds);
    }

    #[test]
    fn top2_is_in_order() {
        assert_eq!(top2(&[-3.0, -1.0, -2.0]), [1, 2]);
        assert_eq!(top2(&[-1.0, -2.0, -0.5]), [2, 0]);
    }
}
