//! The tokenizer of a model.

use std::sync::Arc;

use shoal_core::TokenId;
use shoal_proto::worker::TokenizerBundle;
use shoal_proto::worker::tokenizer_bundle::Kind;

use crate::byte_bpe::ByteBpe;
use crate::detokenize::Detokenizer;
use crate::error::TextError;
use crate::merge::Merger;
use crate::sentencepiece::SentencePiece;
use crate::special::{Fragment, SpecialTokens};
use crate::vocab::{TokenKind, Vocab};

/// The longest text that is tokenized: far more than any context holds.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// How to read a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add the BOS and EOS tokens that the model wants around a text.
    pub add_special: bool,
    /// Read the texts of control tokens as those tokens. Without it they are plain text.
    pub parse_special: bool,
}

/// Turns text into tokens and back. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    vocab: Vocab,
    model: Model,
    special: SpecialTokens,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    /// Put before every text with `add_special`.
    first: Option<TokenId>,
    /// Put after it.
    last: Option<TokenId>,
    space_prefix: bool,
    end_tokens: Vec<TokenId>,
}

enum Model {
    ByteBpe(ByteBpe),
    SentencePiece(SentencePiece),
}

impl Tokenizer {
    /// Builds the tokenizer that `bundle` describes.
    ///
    /// # Errors
    /// If the bundle contradicts itself or asks for an unknown algorithm.
    pub fn new(bundle: &TokenizerBundle) -> Result<Self, TextError> {
        let (model, vocab) = match bundle.kind() {
            Kind::ByteBpe => {
                let (bpe, vocab) = ByteBpe::new(bundle)?;
                (Model::ByteBpe(bpe), vocab)
            }
            Kind::Sentencepiece => {
                let (pieces, vocab) = SentencePiece::new(bundle)?;
                (Model::SentencePiece(pieces), vocab)
            }
            Kind::Unspecified => return Err(TextError::UnknownKind { kind: bundle.kind }),
        };
        for (role, token) in [
            ("BOS", bundle.bos),
            ("EOS", bundle.eos),
            ("unknown", bundle.unknown),
            ("end", bundle.end_tokens.iter().copied().max()),
        ] {
            if token.is_some_and(|token| vocab.kind(token).is_none()) {
                return Err(TextError::MissingToken { role });
            }
        }
        let wanted = |add, token: Option<TokenId>, role| match (add, token) {
            (true, None) => Err(TextError::MissingToken { role }),
            (add, token) => Ok(token.filter(|_| add)),
        };
        Ok(Self(Arc::new(Inner {
            special: SpecialTokens::new(&vocab).map_err(TextError::SpecialTokens)?,
            bos: bundle.bos,
            eos: bundle.eos,
            first: wanted(bundle.add_bos, bundle.bos, "BOS")?,
            last: wanted(bundle.add_eos, bundle.eos, "EOS")?,
            space_prefix: bundle.add_space_prefix && matches!(model, Model::SentencePiece(_)),
            end_tokens: bundle.end_tokens.clone(),
            vocab,
            model,
        })))
    }

    /// The tokens of `text`.
    ///
    /// # Errors
    /// If the text is longer than [`MAX_TEXT_BYTES`], or the vocabulary lacks a byte of it.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<TokenId>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::TextTooLong {
                bytes: text.len(),
                limit: MAX_TEXT_BYTES,
            });
        }
        let Inner {
            special,
            first,
            last,
            ..
        } = &*self.0;
        let mut tokens = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_special {
            tokens.extend(*first);
        }
        match &self.0.model {
            Model::ByteBpe(bpe) => {
                let mut merger = Merger::new();
                special.partition(text, options.parse_special, |fragment| match fragment {
                    Fragment::Text(text) => bpe.encode(text, &mut merger, &mut tokens),
                    Fragment::Token(token) => {
                        tokens.push(token);
                        Ok(())
                    }
                })?;
            }
            Model::SentencePiece(pieces) => {
                let mut merger = Merger::new();
                let mut prefix = self.0.space_prefix;
                special.partition(text, options.parse_special, |fragment| match fragment {
                    Fragment::Text(text) => {
                        let prefix = std::mem::take(&mut prefix);
                        pieces.encode(text, prefix, &mut merger, &mut tokens)
                    }
                    Fragment::Token(token) => {
                        tokens.push(token);
                        prefix = self.0.space_prefix;
                        Ok(())
                    }
                })?;
            }
        }
        if options.add_special {
            tokens.extend(*last);
        }
        Ok(tokens)
    }

    /// The text of `tokens`, control tokens included: the inverse of [`encode`](Self::encode).
    /// What is not UTF-8 becomes U+FFFD, as with [`String::from_utf8_lossy`].
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(self, None).with_special(true);
        for &token in tokens {
            detokenizer.push(token, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// The bytes that a token stands for, possibly a part of a character; the text of a control
    /// token is its name. Empty for an id outside of the vocabulary.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.0.vocab.bytes(token)
    }

    /// What the token is for; none for an id outside of the vocabulary.
    pub(crate) fn kind(&self, token: TokenId) -> Option<TokenKind> {
        self.0.vocab.kind(token)
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab.len()
    }

    /// The tokens that end an answer.
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.0.end_tokens
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<TokenId> {
        self.0.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<TokenId> {
        self.0.eos
    }

    /// Whether merged text that follows another kind of token, or nothing, has a blank put before it.
    pub(crate) fn space_prefix(&self) -> bool {
        self.0.space_prefix
    }
}
