//! The text of one sequence as its own source of drafts (prompt lookup).

use shoal_core::TokenId;

use crate::chains::{Chains, Match, common};

/// Tokens that must agree.
const LEAST_MATCH: usize = 2;
/// Places that are looked at.
const TRIES: usize = 24;

/// Finds where the end of a growing text stood before in it. About 16 bytes a token.
#[derive(Clone, Debug)]
pub struct SessionIndex {
    chains: Chains,
    /// Tokens known.
    known: usize,
}

impl SessionIndex {
    /// An index of a text that will have about so many tokens.
    pub fn new(tokens: usize) -> Self {
        Self {
            chains: Chains::new(tokens),
            known: 0,
        }
    }

    /// Learns what `tokens`, the whole text, has beyond what is known.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        if tokens.len() > self.chains.places() {
            self.chains = Chains::new(2 * tokens.len());
            self.known = 0;
        }
        // The place after the last token is the one that is asked for: it comes later.
        for next in self.known.max(LEAST_MATCH)..tokens.len() {
            self.chains
                .insert(next as u32, &tokens[next - LEAST_MATCH..next]);
        }
        self.known = self.known.max(tokens.len());
    }

    /// The longest match of the end of `tokens`, the text that is known.
    pub fn longest(&self, tokens: &[TokenId]) -> Option<Match> {
        let last = tokens.len().checked_sub(LEAST_MATCH)?;
        self.chains.longest(&tokens[last..], 0, TRIES, |next| {
            let before = tokens[..next as usize].iter().rev();
            common(before.copied(), tokens.iter().rev().copied())
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The longest match by the book.
    fn longest_by_hand(tokens: &[TokenId]) -> usize {
        let length = |next: usize| {
            let before = tokens[..next].iter().rev().copied();
            common(before, tokens.iter().rev().copied())
        };
        (1..tokens.len()).map(length).max().unwrap_or(0)
    }

    #[test]
    fn the_end_of_a_copy_leads_to_its_source() {
        let mut tokens: Vec<TokenId> = (100..160).collect();
        tokens.extend([7, 8, 9]);
        tokens.extend(110..120);
        let mut index = SessionIndex::new(16);
        index.extend(&tokens);
        let found = index.longest(&tokens).unwrap();
        assert_eq!((found.next, found.length), (20, 10));
        assert_eq!(tokens[found.next as usize], 120);
    }

    #[test]
    fn nothing_is_found_in_nothing() {
        for tokens in [&[][..], &[1], &[1, 2], &[1, 2, 3]] {
            let mut index = SessionIndex::new(0);
            index.extend(tokens);
            assert_eq!(index.longest(tokens), None);
        }
    }

    proptest! {
        /// Grown in any pieces, it finds the longest match, unless so many places agree in
        /// their last tokens that not all are looked at.
        #[test]
        fn the_longest_match_is_found(
            tokens in proptest::collection::vec(0u32..40, 3..600),
            pieces in proptest::collection::vec(1usize..50, 0..40),
        ) {
            let mut index = SessionIndex::new(0);
            let mut end = 0;
            for piece in pieces {
                end = (end + piece).min(tokens.len());
                index.extend(&tokens[..end]);
            }
            index.extend(&tokens);
            let longest = longest_by_hand(&tokens);
            match index.longest(&tokens) {
                Some(found) => {
                    prop_assert_eq!(found.length, longest);
                    let next = found.next as usize;
                    let before = &tokens[next - found.length..next];
                    prop_assert!(tokens.ends_with(before));
                }
                None => prop_assert!(longest < LEAST_MATCH),
            }
        }
    }
}
