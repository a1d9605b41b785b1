//! The engine's settings, and the limits they come to with a given backend.

use std::time::Duration;

use shoal_core::{Class, PAGE_TOKENS, Speculation};

use crate::backend::Backend;

/// Settings of the scheduler. [`Engine::start`](crate::engine::Engine::start) checks them once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences that wait; one more is refused as overloaded.
    pub max_waiting: usize,
    /// Most sequences that hold pages; the backend's own limits lower it.
    pub max_running: usize,
    /// Most rows of a step: the token budget; the backend's own limit lowers it.
    pub step_rows: usize,
    /// Most prompt rows of a step.
    pub prefill_chunk: usize,
    /// Prompt rows are added to a step of decoding sequences only while the step is expected
    /// to end within this time.
    pub itl_target: Duration,
    /// Time in the queue that counts as much as one level of priority, so that a low priority
    /// waits long but not for ever.
    pub priority_aging: Duration,
    /// Whether prompt pages are kept and shared.
    pub prefix_cache: bool,
    /// How sequences are drafted for whose requests leave it to the engine; off is off for all.
    pub speculation: Speculation,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_waiting: 1024,
            max_running: 128,
            step_rows: 512,
            prefill_chunk: 256,
            itl_target: Duration::from_millis(50),
            priority_aging: Duration::from_secs(10),
            prefix_cache: true,
            speculation: Speculation::Auto,
        }
    }
}

/// Settings that no engine can run with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit that must be at least 1 is 0.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
}

impl ConfigError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

/// Checked settings, lowered to what the backend takes.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) max_waiting: usize,
    /// At most the rows and the logit rows of a step, so that every decode row fits.
    pub(crate) max_running: usize,
    pub(crate) step_rows: usize,
    pub(crate) logit_rows: usize,
    pub(crate) prefill_chunk: usize,
    pub(crate) itl_target: Duration,
    pub(crate) priority_aging: Duration,
    pub(crate) prefix_cache: bool,
    pub(crate) speculation: Speculation,
    pub(crate) vocab: usize,
    /// Longest prompt + output.
    pub(crate) sequence_tokens: usize,
}

impl Limits {
    pub(crate) fn resolve(
        config: &EngineConfig,
        backend: &dyn Backend,
    ) -> Result<Self, ConfigError> {
        let pool_tokens = backend.pages() as usize * PAGE_TOKENS;
        for (value, name) in [
            (config.max_waiting, "max_waiting"),
            (config.max_running, "max_running"),
            (config.step_rows, "step_rows"),
            (config.prefill_chunk, "prefill_chunk"),
            (backend.max_rows(), "the backend's row limit"),
            (backend.max_logit_rows(), "the backend's logit row limit"),
            (pool_tokens, "the backend's KV pool"),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero(name));
            }
        }
        let step_rows = config.step_rows.min(backend.max_rows());
        Ok(Self {
            max_waiting: config.max_waiting,
            max_running: config
                .max_running
                .min(step_rows)
                .min(backend.max_logit_rows()),
            step_rows,
            logit_rows: backend.max_logit_rows(),
            prefill_chunk: config.prefill_chunk.min(step_rows),
            itl_target: config.itl_target,
            priority_aging: config.priority_aging,
            prefix_cache: config.prefix_cache,
            speculation: config.speculation,
            vocab: backend.spec().vocab,
            sequence_tokens: backend.spec().context.min(pool_tokens),
        })
    }
}
