//! How often a sequence holds each token, kept as it grows.

use std::collections::HashMap;

use shoal_core::{Sampling, TokenId};

/// Occurrences in the output of every token that a penalty concerns. Empty, and free, where
/// no penalty is asked for.
#[derive(Debug, Default)]
pub struct Counts {
    in_output: HashMap<TokenId, u32>,
    active: bool,
}

impl Counts {
    /// Counts for a sequence with this prompt and, resumed, this output.
    pub(crate) fn new(sampling: &Sampling, prompt: &[TokenId], output: &[TokenId]) -> Self {
        let repetition = sampling.repetition_penalty != 1.0;
        let active =
            repetition || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        let mut counts = Self {
            in_output: HashMap::new(),
            active,
        };
        if repetition {
            // Prompt tokens count for the repetition penalty alone.
            counts
                .in_output
                .extend(prompt.iter().map(|&token| (token, 0)));
        }
        for &token in output {
            counts.push(token);
        }
        counts
    }

    /// Counts one more output token.
    pub(crate) fn push(&mut self, token: TokenId) {
        if self.active {
            *self.in_output.entry(token).or_insert(0) += 1;
        }
    }

    /// Every token concerned, with its occurrences in the output.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (TokenId, u32)> + '_ {
        self.in_output.iter().map(|(&token, &count)| (token, count))
    }
}
