//! Tokens to text, one at a time.

use shoal_core::TokenId;

use crate::tokenizer::Tokenizer;
use crate::vocab::TokenKind;

/// Turns a stream of tokens into a stream of whole characters.
///
/// All the text it ever returns is the lossy decoding of all the tokens' bytes, as
/// [`String::from_utf8_lossy`] does it. It holds back at most the three bytes that may
/// become a character yet.
pub struct Detokenizer {
    tokenizer: Tokenizer,
    special: bool,
    /// The next text starts with a blank that its encoding added.
    strip_blank: bool,
    /// The beginning of a character.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Starts after the token `previous` (the last one of a prompt), or at the beginning of a
    /// text. Special tokens are not rendered.
    pub fn new(tokenizer: &Tokenizer, previous: Option<TokenId>) -> Self {
        Self {
            special: false,
            strip_blank: tokenizer.space_prefix()
                && previous.is_none_or(|token| !is_merged(tokenizer.kind(token))),
            pending: Vec::with_capacity(64),
            tokenizer: tokenizer.clone(),
        }
    }

    /// Whether to render special tokens too.
    pub fn with_special(mut self, render: bool) -> Self {
        self.special = render;
        self
    }

    /// Appends to `out` what is certain once `token` is known; may be nothing.
    pub fn push(&mut self, token: TokenId, out: &mut String) {
        let kind = self.tokenizer.kind(token);
        let merged = is_merged(kind);
        if self.special || !kind.is_some_and(TokenKind::is_special) {
            let mut bytes = self.tokenizer.token_bytes(token);
            if self.strip_blank && merged {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
            self.pending.extend_from_slice(bytes);
            drain(&mut self.pending, out);
        }
        self.strip_blank = self.tokenizer.space_prefix() && !merged;
    }

    /// Ends the text: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Whether merging makes such tokens, so that the encoding may have put a blank before them.
fn is_merged(kind: Option<TokenKind>) -> bool {
    matches!(kind, Some(TokenKind::Normal | TokenKind::Byte))
}

/// Moves all but an unfinished character from `bytes` to `out`.
fn drain(bytes: &mut Vec<u8>, out: &mut String) {
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                rest = &[];
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                out.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(invalid) = error.error_len() else {
                    break;
                };
                out.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[invalid..];
            }
        }
    }
    let kept = rest.len();
    bytes.drain(..bytes.len() - kept);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that are often UTF-8, and often cut or broken.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            any::<char>().prop_map(|char| char.to_string().into_bytes()),
            any::<char>().prop_map(|char| {
                let mut bytes = char.to_string().into_bytes();
                bytes.pop();
                bytes
            }),
            prop::collection::vec(any::<u8>(), 0..4),
        ];
        prop::collection::vec(part, 0..20).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn pieces_are_the_lossy_text_however_the_bytes_arrive(
            bytes in bytes(),
            step in 1usize..5,
        ) {
            let mut pending = Vec::new();
            let mut text = String::new();
            for piece in bytes.chunks(step) {
                pending.extend_from_slice(piece);
                drain(&mut pending, &mut text);
                prop_assert!(pending.len() < 4);
            }
            if !pending.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
