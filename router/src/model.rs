//! Text to tokens and back, as the served model has it.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message as _;
use sha2::{Digest, Sha256};
use shoal_proto::worker::{ModelDescription, TokenizerBundle};
use shoal_text::{ChatTemplate, TemplateError, TextError, Tokenizer};

use crate::error::RequestError;

/// SHA-256 of an encoded tokenizer bundle.
pub(crate) type BundleHash = [u8; 32];

/// Tokenizer and chat template of one bundle.
pub(crate) struct TextModel {
    pub(crate) tokenizer: Tokenizer,
    /// Or why the model cannot chat.
    template: Result<ChatTemplate, TemplateError>,
}

impl fmt::Debug for TextModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextModel").finish_non_exhaustive()
    }
}

/// A bundle that does not hold what its worker says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("the tokenizer's SHA-256 is not the announced one")]
    Hash,
    #[error("the tokenizer bundle does not decode")]
    Decode(#[from] prost::DecodeError),
    #[error("the tokenizer bundle cannot be used")]
    Text(#[from] TextError),
}

impl TextModel {
    /// From an encoded bundle, after its hash is checked.
    fn from_bundle(encoded: &[u8], hash: &BundleHash) -> Result<Self, BundleError> {
        if <[u8; 32]>::from(Sha256::digest(encoded)) != *hash {
            return Err(BundleError::Hash);
        }
        let bundle = TokenizerBundle::decode(encoded)?;
        Ok(Self {
            tokenizer: Tokenizer::new(&bundle)?,
            template: ChatTemplate::new(&bundle),
        })
    }

    /// The chat template, if the model has a sound one.
    pub(crate) fn template(&self) -> Result<&ChatTemplate, RequestError> {
        let message = |error: &TemplateError| RequestError::invalid("messages", error.to_string());
        self.template.as_ref().map_err(message)
    }
}

/// What a worker serves.
pub(crate) struct Model {
    pub(crate) name: Arc<str>,
    pub(crate) description: ModelDescription,
    pub(crate) text: Arc<TextModel>,
    /// Unix seconds at which this router first saw it.
    pub(crate) created: u64,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("name", &self.name).finish()
    }
}

impl Model {
    pub(crate) fn new(description: ModelDescription, text: Arc<TextModel>, created: u64) -> Self {
        Self {
            name: description.model.as_str().into(),
            created,
            description,
            text,
        }
    }

    /// Whether it is another's model with the same vocabulary: tokens mean the same in both.
    pub(crate) fn shares_tokens(&self, other: &Self) -> bool {
        self.name == other.name
            && self.description.tokenizer_sha256 == other.description.tokenizer_sha256
    }

    /// Most tokens of prompt and output: the context, or the KV pool where that is smaller.
    pub(crate) fn context(&self) -> u32 {
        let d = &self.description;
        match d.pages.saturating_mul(d.page_size) {
            0 => d.context_length,
            pool => d.context_length.min(pool),
        }
    }
}

/// Now.
pub(crate) fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// Most bundles that are kept, with or without a worker that uses them.
const CACHED_BUNDLES: usize = 16;

/// Text models by the hash of their bundle.
#[derive(Debug, Default)]
pub(crate) struct TextCache(Mutex<Vec<(BundleHash, Arc<TextModel>)>>);

impl TextCache {
    /// The text model, if it is known.
    pub(crate) fn get(&self, hash: &BundleHash) -> Option<Arc<TextModel>> {
        let cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, text) = cache.iter().find(|(known, _)| known == hash)?;
        Some(text.clone())
    }

    /// Checks and builds a text model. Of workers that connect at one time the first to be done
    /// gives all of them theirs. Takes a while: not for an async thread.
    pub(crate) fn add(
        &self,
        encoded: &[u8],
        hash: BundleHash,
    ) -> Result<Arc<TextModel>, BundleError> {
        let text = Arc::new(TextModel::from_bundle(encoded, &hash)?);
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = cache.iter().find(|(known, _)| *known == hash) {
            return Ok(known.clone());
        }
        if cache.len() >= CACHED_BUNDLES {
            cache.remove(0);
        }
        cache.push((hash, text.clone()));
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn workers_of_one_model_share_its_text() {
        let cache = TextCache::default();
        let (encoded, hash) = testing::bundle();
        let first = cache.add(&encoded, hash).unwrap();
        // As of workers that connect at the same time.
        for _ in 0..CACHED_BUNDLES {
            assert!(Arc::ptr_eq(&cache.add(&encoded, hash).unwrap(), &first));
        }
        assert_eq!(cache.0.lock().unwrap().len(), 1);
    }
}
