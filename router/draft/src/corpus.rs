//! Text of one scope: a ring of tokens under chains. 12 bytes a token when it is full.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use shoal_core::TokenId;

use crate::chains::{Chains, LONGEST_MATCH, Match, common};

/// Tokens that must agree.
const LEAST_MATCH: usize = 4;
/// Places that are looked at.
const TRIES: usize = 16;
/// Stands between two texts: no token of a vocabulary.
const BORDER: TokenId = TokenId::MAX;
/// Most places in a life; then everything is forgotten once.
const LAST_PLACE: u32 = u32::MAX - 1;

/// See the [module](self).
#[derive(Clone)]
pub struct Corpus {
    /// By place, modulo its length, which is that of the chains.
    ring: Vec<TokenId>,
    chains: Chains,
    /// Tokens that it may grow to: a power of two.
    capacity: usize,
    /// The first place that holds, and the next to be written.
    first: u32,
    next: u32,
    /// Where each text ends, and when it came.
    ends: VecDeque<(u32, Instant)>,
}

/// Without the text: it belongs to somebody.
impl fmt::Debug for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Corpus")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl Corpus {
    /// An empty one that grows to so many tokens, rounded down to a power of two.
    pub fn new(capacity: usize) -> Self {
        let chains = Chains::new(0);
        let least = chains.places();
        Self {
            ring: vec![BORDER; least],
            chains,
            capacity: (capacity.max(least) / 2 + 1).next_power_of_two(),
            first: 0,
            next: 0,
            ends: VecDeque::new(),
        }
    }

    /// Tokens that it holds, borders between texts included.
    pub fn len(&self) -> usize {
        (self.next - self.first) as usize
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.next == self.first
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.ring.capacity() * size_of::<TokenId>()
            + self.chains.bytes()
            + self.ends.capacity() * size_of::<(u32, Instant)>()
    }

    /// Adds a text, which pushes out the oldest where there is no room.
    pub fn push(&mut self, text: &[TokenId], now: Instant) {
        if text.len() > (LAST_PLACE - self.next) as usize {
            self.clear();
        }
        let text = &text[text.len().saturating_sub(self.capacity - 1)..];
        while self.ring.len() < self.capacity && self.len() + text.len() >= self.ring.len() {
            self.grow();
        }
        for &token in text.iter().chain([&BORDER]) {
            self.write(token);
        }
        self.ends.push_back((self.next, now));
        let first = self.first;
        while self.ends.front().is_some_and(|(end, _)| *end <= first) {
            self.ends.pop_front();
        }
    }

    fn write(&mut self, token: TokenId) {
        let mask = self.ring.len() - 1;
        // The tokens before this place, which a text shorter than a match does not have.
        let mut last = [BORDER; LEAST_MATCH];
        if self.len() >= LEAST_MATCH {
            for (i, last) in last.iter_mut().enumerate() {
                *last = self.ring[(self.next as usize + i - LEAST_MATCH) & mask];
            }
        }
        if token != BORDER && !last.contains(&BORDER) {
            self.chains.insert(self.next, &last);
        }
        self.ring[self.next as usize & mask] = token;
        self.next += 1;
        if self.len() > self.ring.len() {
            self.first = self.next - self.ring.len() as u32;
        }
    }

    /// Doubles the ring.
    fn grow(&mut self) {
        let (first, next, mask) = (self.first, self.next, self.ring.len() - 1);
        let larger = 2 * self.ring.len();
        let ring = std::mem::replace(&mut self.ring, vec![BORDER; larger]);
        self.chains = Chains::new(larger);
        self.next = first;
        for place in first..next {
            self.write(ring[place as usize & mask]);
        }
    }

    /// Forgets the texts that came before a time.
    pub fn expire(&mut self, before: Instant) {
        while let Some(&(end, _)) = self.ends.front().filter(|(_, at)| *at < before) {
            self.first = self.first.max(end);
            self.ends.pop_front();
        }
        if self.is_empty() {
            self.clear();
        }
    }

    /// Forgets everything and gives its memory back.
    pub fn clear(&mut self) {
        *self = Self::new(self.capacity);
    }

    fn at(&self, place: u32) -> TokenId {
        self.ring[place as usize & (self.ring.len() - 1)]
    }

    /// The longest match of the end of a context.
    pub fn longest(&self, context: &[TokenId]) -> Option<Match> {
        let last = context.len().checked_sub(LEAST_MATCH)?;
        self.chains
            .longest(&context[last..], self.first, TRIES, |next| {
                let before = (self.first..next).rev().map(|place| self.at(place));
                common(before, context.iter().rev().copied())
            })
    }

    /// The tokens from a place on, to the end of their text, at most `most` of them.
    pub fn read(&self, from: u32, most: usize) -> impl Iterator<Item = TokenId> + '_ {
        (from.max(self.first)..self.next)
            .take(most)
            .map(|place| self.at(place))
            .take_while(|&token| token != BORDER)
    }

    /// Whether a run of at least [`LEAST_MATCH`] + 1 tokens, and at most [`LONGEST_MATCH`],
    /// stands in it.
    pub fn contains(&self, run: &[TokenId]) -> bool {
        debug_assert!((LEAST_MATCH + 1..=LONGEST_MATCH).contains(&run.len()));
        let (last, before) = (run[run.len() - 1], &run[..run.len() - 1]);
        let from = before.len() - LEAST_MATCH;
        let found = self
            .chains
            .longest(&before[from..], self.first, usize::MAX, |next| {
                let length = common(
                    (self.first..next).rev().map(|place| self.at(place)),
                    before.iter().rev().copied(),
                );
                // What does not go on as the run does is no match at all.
                if length == before.len() && self.at(next) == last {
                    LONGEST_MATCH
                } else {
                    0
                }
            });
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn continuation(corpus: &Corpus, context: &[TokenId]) -> Vec<TokenId> {
        let found = corpus.longest(context).expect("a match");
        corpus.read(found.next, 8).collect()
    }

    #[test]
    fn a_text_is_found_and_ends_where_it_ends() {
        let mut corpus = Corpus::new(1 << 12);
        let now = Instant::now();
        corpus.push(&[1, 2, 3, 4, 5, 6], now);
        corpus.push(&[7, 8, 9, 10, 11], now);
        assert_eq!(continuation(&corpus, &[0, 1, 2, 3, 4]), [5, 6]);
        assert_eq!(continuation(&corpus, &[7, 8, 9, 10]), [11]);
        // Three tokens are too few, and no match reaches over the end of a text.
        assert_eq!(corpus.longest(&[0, 0, 1, 2, 3]), None);
        assert_eq!(corpus.longest(&[3, 4, 5, 6]), None);
        assert_eq!(corpus.longest(&[4, 5, 6, BORDER]), None);
    }

    #[test]
    fn runs_are_contained() {
        let mut corpus = Corpus::new(1 << 12);
        for text in [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]] {
            corpus.push(&text, Instant::now());
        }
        assert!(corpus.contains(&[1, 2, 3, 4, 5, 6]));
        assert!(corpus.contains(&[2, 3, 4, 5, 7]));
        assert!(!corpus.contains(&[2, 3, 4, 5, 8]));
        assert!(!corpus.contains(&[9, 3, 4, 5, 6]));
    }

    #[test]
    fn old_texts_go() {
        let start = Instant::now();
        let mut corpus = Corpus::new(1 << 12);
        corpus.push(&[1, 2, 3, 4, 5], start);
        corpus.push(&[6, 7, 8, 9, 10], start + Duration::from_secs(9));
        corpus.expire(start + Duration::from_secs(5));
        assert_eq!(corpus.longest(&[1, 2, 3, 4]), None);
        assert_eq!(continuation(&corpus, &[6, 7, 8, 9]), [10]);
        corpus.expire(start + Duration::from_secs(10));
        assert!(corpus.is_empty());
        assert_eq!(corpus.longest(&[6, 7, 8, 9]), None);
    }

    #[test]
    fn the_end_of_the_places_is_a_new_beginning() {
        let mut corpus = Corpus::new(1 << 12);
        (corpus.first, corpus.next) = (LAST_PLACE - 4, LAST_PLACE - 4);
        corpus.push(&[1, 2, 3, 4, 5], Instant::now());
        assert_eq!(corpus.len(), 6);
        assert_eq!(continuation(&corpus, &[1, 2, 3, 4]), [5]);
    }

    #[test]
    fn a_full_one_costs_12_bytes_a_token_and_no_more() {
        let mut corpus = Corpus::new(1 << 16);
        for text in 0..1000u32 {
            let text: Vec<TokenId> = (0..200).map(|i| text * 7919 + i).collect();
            corpus.push(&text, Instant::now());
        }
        assert_eq!(corpus.len(), 1 << 16);
        let per_token = corpus.bytes() as f64 / corpus.len() as f64;
        assert!(per_token < 13.0, "{per_token}");
    }

    proptest! {
        /// Whatever was pushed out: a match is one, and what it reads did follow.
        #[test]
        fn matches_are_true(
            texts in proptest::collection::vec(
                proptest::collection::vec(0u32..6, 0..120), 1..40),
            context in proptest::collection::vec(0u32..6, 0..12),
        ) {
            let mut corpus = Corpus::new(512);
            for text in &texts {
                corpus.push(text, Instant::now());
                prop_assert!(corpus.len() <= 512);
            }
            if let Some(found) = corpus.longest(&context) {
                let after: Vec<TokenId> = corpus.read(found.next, 8).collect();
                prop_assert!(!after.is_empty());
                let mut run = context[context.len() - found.length..].to_vec();
                run.extend(after);
                let stands = |text: &Vec<TokenId>| text.windows(run.len()).any(|w| w == run);
                prop_assert!(texts.iter().any(stands), "{run:?}");
            }
            let newest = texts.last().unwrap();
            if newest.len() >= 6 {
                prop_assert!(corpus.contains(&newest[..6]));
            }
        }
    }
}
