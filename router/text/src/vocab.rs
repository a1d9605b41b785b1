//! The tokens of a model: their kinds and the bytes they stand for.

use shoal_core::TokenId;
use shoal_proto::worker::TokenizerBundle;

use crate::error::TextError;

/// More tokens or merges than any model has; a bundle beyond it is malformed or hostile.
const MAX_ENTRIES: usize = 1 << 21;

/// What a token is for (the token types of GGUF).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Text.
    Normal,
    /// Stands for what the vocabulary cannot express.
    Unknown,
    /// Markup of the model, never text.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// A placeholder without text.
    Unused,
    /// One byte, written `<0xNN>`.
    Byte,
}

impl TokenKind {
    fn from_type(ty: u32) -> Self {
        match ty {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Unused,
        }
    }

    /// Whether the token is markup rather than text.
    pub(crate) fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

/// Kinds and bytes of all tokens.
pub(crate) struct Vocab {
    kinds: Vec<TokenKind>,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where the bytes of each token end.
    ends: Vec<u32>,
}

impl Vocab {
    /// Checks the lists of `bundle` against one another; `decode` turns the text of a normal
    /// token into bytes.
    pub(crate) fn new(
        bundle: &TokenizerBundle,
        decode: impl Fn(&str, &mut Vec<u8>),
    ) -> Result<Self, TextError> {
        let tokens = bundle.tokens.len();
        for entries in [tokens, bundle.merges.len()] {
            if entries > MAX_ENTRIES {
                let limit = MAX_ENTRIES;
                return Err(TextError::TooManyTokens {
                    tokens: entries,
                    limit,
                });
            }
        }
        for (list, entries) in [
            ("token types", bundle.token_types.len()),
            ("scores", bundle.scores.len()),
        ] {
            if entries != 0 && entries != tokens {
                return Err(TextError::ListLength {
                    list,
                    entries,
                    tokens,
                });
            }
        }
        let mut vocab = Self {
            kinds: Vec::with_capacity(tokens),
            bytes: Vec::with_capacity(tokens * 8),
            ends: Vec::with_capacity(tokens),
        };
        for (id, text) in bundle.tokens.iter().enumerate() {
            let kind = bundle
                .token_types
                .get(id)
                .map_or(TokenKind::Normal, |&ty| TokenKind::from_type(ty));
            match kind {
                TokenKind::Normal => decode(text, &mut vocab.bytes),
                TokenKind::Unused => {}
                TokenKind::Byte => match byte_of(text) {
                    Some(byte) => vocab.bytes.push(byte),
                    None => vocab.bytes.extend_from_slice(text.as_bytes()),
                },
                TokenKind::Unknown | TokenKind::Control | TokenKind::UserDefined => {
                    vocab.bytes.extend_from_slice(text.as_bytes());
                }
            }
            vocab.kinds.push(kind);
            let end = u32::try_from(vocab.bytes.len()).map_err(|_| TextError::TooManyTokens {
                tokens,
                limit: MAX_ENTRIES,
            })?;
            vocab.ends.push(end);
        }
        Ok(vocab)
    }

    pub(crate) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The kind of a token, if it is one.
    pub(crate) fn kind(&self, token: TokenId) -> Option<TokenKind> {
        self.kinds.get(token as usize).copied()
    }

    /// The bytes a token stands for; none for an id outside of the vocabulary.
    pub(crate) fn bytes(&self, token: TokenId) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else {
            return &[];
        };
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// All tokens with their kinds.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = (TokenId, TokenKind)> + '_ {
        (0..).zip(self.kinds.iter().copied())
    }
}

/// The byte that a byte token's text (`<0x0A>`) names.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_tokens_are_parsed_strictly() {
        assert_eq!(byte_of("<0x0A>"), Some(10));
        assert_eq!(byte_of("<0xff>"), Some(255));
        for text in ["<0x0>", "<0x+A>", "<0x0AA>", "0x0A", "<0x0G>"] {
            assert_eq!(byte_of(text), None, "{text}");
        }
    }

    #[test]
    fn lists_of_other_lengths_are_refused() {
        let bundle = TokenizerBundle {
            tokens: vec!["a".into(), "b".into()],
            token_types: vec![1],
            ..Default::default()
        };
        let error = Vocab::new(&bundle, |_, _| {}).err();
        assert!(matches!(
            error,
            Some(TextError::ListLength {
                list: "token types",
                ..
            })
        ));
    }
}
