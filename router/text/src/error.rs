//! What can go wrong between text and tokens.

use shoal_core::{Class, TokenId};
use shoal_gguf::GgufError;

/// Why a tokenizer could not be built or a text not be turned into tokens.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The model file lacks an entry, or has one of another type.
    #[error("the model file has no usable tokenizer")]
    File(#[from] GgufError),
    /// The tokenizer that the model names is of no known kind.
    #[error("unknown kind of tokenizer {model:?}")]
    UnknownModel {
        /// `tokenizer.ggml.model` of the file.
        model: String,
    },
    /// The pre-tokenizer that the model names is not known.
    #[error("unknown pre-tokenizer {pre:?}")]
    UnknownPreTokenizer {
        /// `tokenizer.ggml.pre` of the model.
        pre: String,
    },
    /// The bundle does not say which algorithm it is for.
    #[error("the tokenizer bundle names no known kind of tokenizer ({kind})")]
    UnknownKind {
        /// The kind as it stands in the bundle.
        kind: i32,
    },
    /// A list of the vocabulary is not as long as the list of tokens.
    #[error("the vocabulary has {tokens} tokens but {entries} {list}")]
    ListLength {
        /// The list at fault.
        list: &'static str,
        /// Its length.
        entries: usize,
        /// The number of tokens.
        tokens: usize,
    },
    /// The vocabulary has more tokens than any model.
    #[error("the vocabulary has {tokens} tokens, more than {limit}")]
    TooManyTokens {
        /// Tokens or merges found.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// A merge does not consist of two tokens, or makes something that is none.
    #[error("merge {rank} ({merge:?}) is not made of tokens of the vocabulary")]
    InvalidMerge {
        /// Position in the list of merges.
        rank: usize,
        /// The merge as written.
        merge: String,
    },
    /// A token has a score that cannot be ordered.
    #[error("token {token} has no number as its score")]
    InvalidScore {
        /// The token.
        token: TokenId,
    },
    /// A special token lies outside of the vocabulary, or is needed and missing.
    #[error("the vocabulary has no {role} token")]
    MissingToken {
        /// What the token is for.
        role: &'static str,
    },
    /// The special tokens do not fit a search automaton.
    #[error("the special tokens cannot be searched for")]
    SpecialTokens(#[source] aho_corasick::BuildError),
    /// A regular expression of a pre-tokenizer does not compile.
    #[error("the pre-tokenizer {pre:?} cannot be built")]
    PreTokenizer {
        /// Its name.
        pre: String,
        /// Why.
        source: Box<regex_automata::meta::BuildError>,
    },
    /// A bundle is not the one that was asked for.
    #[error("the tokenizer bundle does not have the digest it was asked for by")]
    WrongDigest,
    /// The bytes of a bundle are no bundle.
    #[error("malformed tokenizer bundle")]
    Decode(#[from] prost::DecodeError),
    /// A text is longer than any context.
    #[error("the text has {bytes} bytes, more than {limit}")]
    TextTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The vocabulary cannot express a byte of the text.
    #[error("the vocabulary has no token for the byte {byte:#04x}")]
    NoTokenForByte {
        /// The byte.
        byte: u8,
    },
}

/// What is wrong with a set of stop strings.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// More of them than allowed.
    #[error("{count} stop strings, more than {limit}")]
    TooMany {
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// One is empty: it would match everywhere.
    #[error("stop string {index} is empty")]
    Empty {
        /// Which one.
        index: usize,
    },
    /// One is longer than allowed.
    #[error("stop string {index} has {bytes} bytes, more than {limit}")]
    TooLong {
        /// Which one.
        index: usize,
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
}

impl StopError {
    /// Always the request's fault.
    pub fn class(&self) -> Class {
        Class::Client
    }
}

impl TextError {
    /// Whose fault it is: the model's, or the request's.
    pub fn class(&self) -> Class {
        match self {
            Self::TextTooLong { .. } | Self::NoTokenForByte { .. } => Class::Client,
            Self::WrongDigest => Class::Retry,
            _ => Class::Fatal,
        }
    }
}

/// Why a chat did not become a prompt.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has no chat template, and its vocabulary suggests none.
    #[error("the model has no chat template; send a plain prompt instead")]
    Missing,
    /// The template of the model is malformed.
    #[error("the chat template of the model is malformed: {0}")]
    Syntax(#[source] minijinja::Error),
    /// The template refuses these messages (`raise_exception`).
    #[error("{message}")]
    Raised {
        /// The template's own words.
        message: String,
    },
    /// Rendering costs too much: too many steps or too much text.
    #[error("the chat template exceeds its budget with these messages")]
    Budget,
    /// The template fails with these messages.
    #[error("the chat template does not accept these messages: {0}")]
    Render(#[source] minijinja::Error),
}

impl TemplateError {
    /// Whose fault it is: the model's, or the request's.
    pub fn class(&self) -> Class {
        match self {
            Self::Syntax(_) => Class::Fatal,
            _ => Class::Client,
        }
    }
}
