//! Chains of places with equal hashes of their last tokens, newest first, as LZ77 compressors
//! keep them (Deutsch, RFC 1951, section 4). A found place is compared token by token, so a
//! collision costs a comparison and no more.

use shoal_core::TokenId;

/// Longest match that is told apart from longer ones.
pub const LONGEST_MATCH: usize = 64;

/// No place.
const NONE: u32 = u32::MAX;

/// Where the end of a context stood before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// The place of the token that followed.
    pub next: u32,
    /// Equal tokens before it; at most [`LONGEST_MATCH`].
    pub length: usize,
}

/// The chains of a ring of places. `heads` and `links` have a power of two of entries.
#[derive(Clone, Debug)]
pub(crate) struct Chains {
    /// By hash: the newest place.
    heads: Vec<u32>,
    /// By place, modulo their number: the place before it with the same hash.
    links: Vec<u32>,
}

/// The least number of places.
const LEAST: usize = 256;

impl Chains {
    /// Chains for so many places at least.
    pub(crate) fn new(places: usize) -> Self {
        let places = places.next_power_of_two().max(LEAST);
        Self {
            heads: vec![NONE; places],
            links: vec![NONE; places],
        }
    }

    /// Places that do not push one another out.
    pub(crate) fn places(&self) -> usize {
        self.links.len()
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> usize {
        (self.heads.capacity() + self.links.capacity()) * size_of::<u32>()
    }

    fn bucket(&self, last: &[TokenId]) -> usize {
        let hash = last.iter().fold(0u64, |hash, &token| {
            (hash ^ u64::from(token))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        });
        // The upper bits of a product are its best ones.
        (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.heads.len() - 1)
    }

    /// Adds place `next`, before which the tokens `last` stand.
    pub(crate) fn insert(&mut self, next: u32, last: &[TokenId]) {
        let bucket = self.bucket(last);
        let place = next as usize & (self.links.len() - 1);
        self.links[place] = self.heads[bucket];
        self.heads[bucket] = next;
    }

    /// The longest match among the newest `tries` places of the chain of `last`, the newest of
    /// equals. `oldest` is the first place that still holds; `length` measures the match that
    /// ends before a place.
    pub(crate) fn longest(
        &self,
        last: &[TokenId],
        oldest: u32,
        tries: usize,
        mut length: impl FnMut(u32) -> usize,
    ) -> Option<Match> {
        let mut best: Option<Match> = None;
        let mut next = self.heads[self.bucket(last)];
        for _ in 0..tries {
            if next == NONE || next < oldest {
                break;
            }
            // Read first: the memory fetches it while the place is compared.
            let before = self.links[next as usize & (self.links.len() - 1)];
            let found = length(next);
            if found >= last.len() && best.is_none_or(|best| found > best.length) {
                best = Some(Match {
                    next,
                    length: found,
                });
                if found >= LONGEST_MATCH {
                    break;
                }
            }
            // An entry that was written over leads to a newer place: the chain ends.
            if before >= next {
                break;
            }
            next = before;
        }
        best
    }
}

/// Equal tokens at the ends of two texts, given backwards.
pub(crate) fn common(
    mut a: impl Iterator<Item = TokenId>,
    mut b: impl Iterator<Item = TokenId>,
) -> usize {
    let equal = |_: &usize| matches!((a.next(), b.next()), (Some(a), Some(b)) if a == b);
    (0..LONGEST_MATCH).take_while(equal).count()
}
