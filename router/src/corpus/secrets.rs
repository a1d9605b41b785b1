//! What of an answer is about one user alone, by its looks: numbers, addresses.

use std::ops::Range;

use shoal_core::TokenId;
use shoal_text::Tokenizer;

/// A number of so many digits may name somebody: an order, a card, a telephone.
const DIGITS: usize = 4;

/// The tokens that hold long numbers or e-mail addresses.
pub(super) fn find(tokenizer: &Tokenizer, tokens: &[TokenId]) -> Vec<Range<usize>> {
    stretches(tokens.iter().map(|&token| tokenizer.token_bytes(token)))
}

/// The pieces that belong to a word with an `@` or with so many digits; separators within
/// numbers (`12-34`, `12 34`) do not end them.
fn stretches<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut number = Word::default();
    let mut word = Word::default();
    let mut end = 0;
    for (i, piece) in pieces.enumerate() {
        for &byte in piece {
            if byte.is_ascii_whitespace() {
                word.end(|word| word.at_signs > 0, &mut found);
            } else {
                word.take(byte, i);
            }
            if byte.is_ascii_digit() || (number.digits > 0 && b" -./".contains(&byte)) {
                number.take(byte, i);
            } else {
                number.end(|number| number.digits >= DIGITS, &mut found);
            }
        }
        end = i + 1;
    }
    word.end(|word| word.at_signs > 0, &mut found);
    number.end(|number| number.digits >= DIGITS, &mut found);
    merge(found, end)
}

#[derive(Default)]
struct Word {
    pieces: Range<usize>,
    digits: usize,
    at_signs: usize,
}

impl Word {
    fn take(&mut self, byte: u8, piece: usize) {
        if self.pieces.is_empty() {
            self.pieces.start = piece;
        }
        self.pieces.end = piece + 1;
        self.digits += usize::from(byte.is_ascii_digit());
        self.at_signs += usize::from(byte == b'@');
    }

    fn end(&mut self, is_secret: impl Fn(&Self) -> bool, found: &mut Vec<Range<usize>>) {
        let word = std::mem::take(self);
        if is_secret(&word) {
            found.push(word.pieces);
        }
    }
}

/// Ascending and apart.
fn merge(mut found: Vec<Range<usize>>, end: usize) -> Vec<Range<usize>> {
    found.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(found.len());
    for range in found {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    debug_assert!(merged.last().is_none_or(|last| last.end <= end));
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First and last piece of each.
    fn found(pieces: &[&str]) -> Vec<(usize, usize)> {
        let found = stretches(pieces.iter().map(|piece| piece.as_bytes()));
        found.iter().map(|r| (r.start, r.end - 1)).collect()
    }

    #[test]
    fn long_numbers_and_addresses_are_secret() {
        assert_eq!(
            found(&["order", " NW", "-", "9", "1", "5", "1", " is"]),
            [(3, 7)]
        );
        assert!(found(&["in", " ", "1", "4", " days"]).is_empty());
        assert_eq!(found(&["call", " 030", " 12", "34", "."]), [(1, 4)]);
        assert_eq!(
            found(&["write to ann", "a@", "mail", ".org", " or"]),
            [(0, 3)]
        );
        assert_eq!(found(&["a@b", " 12345"]), [(0, 1)]);
        assert_eq!(found(&["x", " 12345"]), [(1, 1)]);
    }
}
