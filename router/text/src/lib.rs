//! Text and tokens: tokenizers as model files describe them, chat templates, incremental
//! detokenization and stop strings.
//!
//! A worker turns its model file into a [`TokenizerBundle`] with [`bundle_from_gguf`]; a router
//! builds a [`Tokenizer`] and a [`ChatTemplate`] from the bundle and needs nothing else.
//!
//! [`TokenizerBundle`]: shoal_proto::worker::TokenizerBundle

#![forbid(unsafe_code)]

mod bundle;
mod byte_bpe;
mod byte_level;
mod detokenize;
mod error;
mod json;
mod merge;
mod metadata;
mod pretokenize;
mod sentencepiece;
mod special;
mod stop;
mod template;
mod tokenizer;
mod vocab;

pub use bundle::{EncodedBundle, decode_bundle};
pub use detokenize::Detokenizer;
pub use error::{StopError, TemplateError, TextError};
pub use metadata::bundle_from_gguf;
pub use stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS, StopMatcher};
pub use template::{ChatTemplate, Message};
pub use tokenizer::{EncodeOptions, MAX_TEXT_BYTES, Tokenizer};
