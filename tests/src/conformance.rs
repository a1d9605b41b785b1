//! Whether a backend keeps the contract of `Batch` and computes the right logits.

use shoal_core::{Role, TokenId};
use shoal_engine::backend::{Backend, BackendError};

use crate::drive::{Sequence, Step};

/// Tokens of the sequences of [`scenario`].
const LENGTHS: [usize; 3] = [75, 9, 33];

/// Its steps: each a list of (sequence, rows, role).
const STEPS: [&[(usize, usize, Role)]; 5] = [
    &[(0, 40, Role::Prompt)],
    // Across the border of a page, beside another sequence.
    &[(0, 30, Role::Prompt), (1, 5, Role::Prompt)],
    // Prefill and decode mixed; sequence 2 twice, its second rows attend to its first.
    &[
        (0, 1, Role::Output),
        (1, 2, Role::Prompt),
        (2, 20, Role::Prompt),
        (2, 11, Role::Prompt),
    ],
    // Decode; sequence 2 fills its page.
    &[
        (0, 1, Role::Output),
        (1, 1, Role::Output),
        (2, 1, Role::Output),
    ],
    // Verify rows beside decode; sequence 2 opens a page.
    &[
        (0, 3, Role::Output),
        (1, 1, Role::Output),
        (2, 1, Role::Output),
    ],
];

/// What a sequence was, and what it gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// The logits of every row.
    pub logits: Vec<f32>,
}

/// Three sequences through prefill, decode and verification on scattered pages. It takes 7
/// pages, and up to 40 rows at once.
pub fn scenario(backend: &mut dyn Backend) -> Result<Vec<Trace>, BackendError> {
    let vocab = backend.spec().vocab;
    let pages = [vec![5, 0, 3], vec![2], vec![6, 1]];
    let mut sequences = pages.map(Sequence::new);
    let mut results: Vec<Trace> = (1..)
        .zip(LENGTHS)
        .map(|(seed, length)| Trace {
            tokens: tokens(seed, length, vocab),
            logits: Vec::new(),
        })
        .collect();
    for segments in STEPS {
        let mut step = Step::default();
        for &(i, rows, role) in segments {
            let start = sequences[i].position();
            let tokens = &results[i].tokens[start..start + rows];
            step.push(&mut sequences[i], tokens, role);
        }
        let logits = step.run(backend)?;
        let mut rest = &logits[..];
        for &(i, rows, _) in segments {
            let (these, after) = rest.split_at(rows * vocab);
            results[i].logits.extend_from_slice(these);
            rest = after;
        }
    }
    for Trace { tokens, logits } in &results {
        assert_eq!(logits.len(), tokens.len() * vocab);
    }
    Ok(results)
}

/// `length` tokens of the vocabulary, the same for the same seed.
fn tokens(seed: u32, length: usize, vocab: usize) -> Vec<TokenId> {
    (0..length as u32)
        .map(|i| {
            (i.wrapping_mul(2_654_435_761).rotate_left(9) ^ seed.wrapping_mul(40_503))
                % vocab as u32
        })
        .collect()
}

/// Root mean square of the differences, in standard deviations of the reference.
pub fn relative_error(reference: &[f32], tested: &[f32]) -> f64 {
    assert_eq!(reference.len(), tested.len());
    let n = reference.len() as f64;
    let mean = reference.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = reference
        .iter()
        .map(|&x| (f64::from(x) - mean).powi(2))
        .sum::<f64>()
        / n;
    let differences = reference
        .iter()
        .zip(tested)
        .map(|(&x, &y)| f64::from(x) - f64::from(y));
    (differences.map(|d| d * d).sum::<f64>() / n / variance).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_is_relative_to_the_spread() {
        let reference = [1.0, 3.0, 1.0, 3.0];
        assert_eq!(relative_error(&reference, &reference), 0.0);
        assert_eq!(relative_error(&reference, &[1.5, 3.5, 1.5, 3.5]), 0.5);
    }
}
