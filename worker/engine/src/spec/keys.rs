//! Checked reads of one architecture's metadata.

use shoal_gguf::Gguf;

use super::{Architecture, SpecError};

/// The keys `<architecture>.<name>` of a file.
pub(super) struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: Architecture,
}

impl<'a> Keys<'a> {
    pub(super) fn new(gguf: &'a Gguf, architecture: Architecture) -> Self {
        Self { gguf, architecture }
    }

    pub(super) fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// The full key of `name`.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name())
    }

    /// An integer from 1 to `limit`, if it is there.
    pub(super) fn count(&self, name: &str, limit: usize) -> Result<Option<usize>, SpecError> {
        let key = self.key(name);
        let Some(value) = self.gguf.get::<u32>(&key)? else {
            return Ok(None);
        };
        let value = value as usize;
        if value == 0 || value > limit {
            let reason = format!("{value} is not within 1 and {limit}");
            return Err(SpecError::Invalid { key, reason });
        }
        Ok(Some(value))
    }

    /// An integer from 1 to `limit`.
    pub(super) fn required_count(&self, name: &str, limit: usize) -> Result<usize, SpecError> {
        self.count(name, limit)?
            .ok_or_else(|| SpecError::Missing(self.key(name)))
    }

    /// An integer that may be 0, for features that 0 turns off.
    pub(super) fn switch(&self, name: &str) -> Result<u32, SpecError> {
        Ok(self.gguf.get::<u32>(&self.key(name))?.unwrap_or(0))
    }

    /// A finite number above 0, if it is there.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, SpecError> {
        let key = self.key(name);
        let Some(value) = self.gguf.get::<f32>(&key)? else {
            return Ok(None);
        };
        if !(value.is_finite() && value > 0.0) {
            let reason = format!("{value} is no positive number");
            return Err(SpecError::Invalid { key, reason });
        }
        Ok(Some(f64::from(value)))
    }

    /// A string, if it is there.
    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, SpecError> {
        Ok(self.gguf.get::<&str>(&self.key(name))?)
    }

    /// A refusal of `feature`, which `name` asks for.
    pub(super) fn unsupported(
        &self,
        feature: &'static str,
        name: &str,
        value: impl ToString,
    ) -> SpecError {
        SpecError::Unsupported {
            feature,
            key: self.key(name),
            value: value.to_string(),
        }
    }
}
