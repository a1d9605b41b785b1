//! SentencePiece byte-pair encoding: neighbours merge to the token with the best score, and
//! what no token covers falls back to bytes.

use rustc_hash::FxHashMap;
use shoal_core::TokenId;
use shoal_proto::worker::TokenizerBundle;

use crate::error::TextError;
use crate::merge::{Merge, Merger};
use crate::vocab::{TokenKind, Vocab};

/// What SentencePiece writes for a blank.
const BLANK: &str = "▁";

/// A stretch of the text, and the token it is, if it is one.
#[derive(Clone, Copy)]
pub(crate) struct Symbol {
    start: u32,
    end: u32,
    token: Option<TokenId>,
}

/// The tokens of a model by their text, and the fallbacks.
pub(crate) struct SentencePiece {
    /// Text (with [`BLANK`]s) → token and how soon it is merged.
    pieces: FxHashMap<Box<str>, Merge<TokenId>>,
    /// The longest text in `pieces`, in bytes.
    longest: usize,
    bytes: [Option<TokenId>; 256],
    unknown: Option<TokenId>,
}

impl SentencePiece {
    /// Reads the vocabulary of `bundle`.
    pub(crate) fn new(bundle: &TokenizerBundle) -> Result<(Self, Vocab), TextError> {
        let vocab = Vocab::new(bundle, |text, out| {
            out.extend_from_slice(text.replace(BLANK, " ").as_bytes());
        })?;
        let mut pieces: FxHashMap<Box<str>, Merge<TokenId>> = FxHashMap::default();
        let mut bytes = [None; 256];
        for ((token, kind), text) in vocab.kinds().zip(&bundle.tokens) {
            match kind {
                TokenKind::Normal => {
                    let score = bundle.scores.get(token as usize).copied().unwrap_or(0.0);
                    let priority = urgency(score).ok_or(TextError::InvalidScore { token })?;
                    pieces.insert(
                        text.as_str().into(),
                        Merge {
                            priority,
                            symbol: token,
                        },
                    );
                }
                TokenKind::Byte => {
                    if let &[byte] = vocab.bytes(token) {
                        bytes[usize::from(byte)] = Some(token);
                    }
                }
                // The rest is never made by merging: it is found in the text as it stands.
                _ => {}
            }
        }
        let longest = pieces.keys().map(|text| text.len()).max().unwrap_or(0);
        Ok((
            Self {
                pieces,
                longest,
                bytes,
                unknown: bundle.unknown,
            },
            vocab,
        ))
    }

    /// Appends the tokens of `text`; `prefix` puts a blank before it.
    pub(crate) fn encode(
        &self,
        text: &str,
        prefix: bool,
        merger: &mut Merger<Symbol>,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TextError> {
        let mut escaped = String::with_capacity(text.len() + text.len() / 2);
        if prefix {
            escaped.push_str(BLANK);
        }
        for (at, part) in text.split(' ').enumerate() {
            if at > 0 {
                escaped.push_str(BLANK);
            }
            escaped.push_str(part);
        }
        let text = escaped.as_str();
        let chars = text.char_indices().map(|(start, char)| {
            let end = start + char.len_utf8();
            Symbol {
                start: start as u32,
                end: end as u32,
                token: self.pieces.get(&text[start..end]).map(|piece| piece.symbol),
            }
        });
        let pair = |left: Symbol, right: Symbol| {
            let range = left.start as usize..right.end as usize;
            if range.len() > self.longest {
                return None;
            }
            let &Merge { priority, symbol } = self.pieces.get(&text[range])?;
            let symbol = Symbol {
                start: left.start,
                end: right.end,
                token: Some(symbol),
            };
            Some(Merge { priority, symbol })
        };
        merger.run(chars, pair, |symbol| match symbol.token {
            Some(token) => {
                out.push(token);
                Ok(())
            }
            None => self.fall_back(&text[symbol.start as usize..symbol.end as usize], out),
        })
    }

    /// Appends the bytes of a character that is no token, or else the unknown token.
    fn fall_back(&self, char: &str, out: &mut Vec<TokenId>) -> Result<(), TextError> {
        let before = out.len();
        for byte in char.bytes() {
            match (self.bytes[usize::from(byte)], self.unknown) {
                (Some(token), _) => out.push(token),
                (None, Some(unknown)) => {
                    out.truncate(before);
                    out.push(unknown);
                    return Ok(());
                }
                (None, None) => return Err(TextError::NoTokenForByte { byte }),
            }
        }
        Ok(())
    }
}

/// Orders scores the other way round, as whole numbers: the best is the smallest. None for NaN.
fn urgency(score: f32) -> Option<u32> {
    if score.is_nan() {
        return None;
    }
    // Adding zero makes -0 equal to 0.
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    Some(!ascending)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn urgency_reverses_the_order_of_scores(a: f32, b: f32) {
            prop_assume!(!a.is_nan() && !b.is_nan());
            prop_assert_eq!(urgency(a).cmp(&urgency(b)), b.partial_cmp(&a).expect("numbers"));
        }
    }

    #[test]
    fn scores_must_be_numbers() {
        assert_eq!(urgency(f32::NAN), None);
        assert_eq!(urgency(-0.0), urgency(0.0));
    }
}
