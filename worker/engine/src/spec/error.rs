use shoal_core::Class;
use shoal_gguf::GgufError;

use super::Architecture;

/// Why a file is no model that the engine runs.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The family of the model is unknown.
    #[error("architecture `{0}` is not supported; supported are {list}", list = supported())]
    UnknownArchitecture(String),
    /// The model needs something that the engine does not do.
    #[error("{feature} is not supported ({key} = {value})")]
    Unsupported {
        /// What it needs.
        feature: &'static str,
        /// The metadata key that says so.
        key: String,
        /// Its value.
        value: String,
    },
    /// A metadata key that every model of the family has is missing.
    #[error("metadata key {0} is missing")]
    Missing(String),
    /// A metadata value contradicts the others, or is out of range.
    #[error("metadata key {key}: {reason}")]
    Invalid {
        /// The key.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A tensor is missing, superfluous, or of the wrong shape or type.
    #[error("tensor {tensor}: {reason}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A metadata value has the wrong type.
    #[error(transparent)]
    Metadata(#[from] GgufError),
}

impl SpecError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

fn supported() -> String {
    Architecture::ALL.map(Architecture::name).join(", ")
}
