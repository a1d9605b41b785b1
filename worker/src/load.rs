//! From a model file to a backend and a tokenizer.
use shoal_core::Class;
use shoal_engine::backend::Backend;
use shoal_proto::worker::TokenizerBundle;

/// A model, ready to run.
pub(crate) struct Loaded {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) tokenizer: TokenizerBundle,
}

/// Why a file gives no model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {}
impl LoadError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}
pub(crate) fn model(_config: &crate::WorkerConfig) -> Result<Loaded, LoadError> {
    todo!()
}
