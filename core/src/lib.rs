//! What routers and workers must agree on, bit for bit: page hashes, sampling
//! parameters and their limits, the noise that makes sampling reproducible, and the
//! classes of errors.

#![forbid(unsafe_code)]

mod class;
mod noise;
mod page;
mod params;
mod speculation;

pub use class::Class;
pub use noise::NoiseKey;
pub use page::{Namespace, PAGE_TOKENS, PageHash, Role, prompt_pages};
pub use params::{
    LogitBias, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_TOP_LOGPROBS, ParamError, Sampling, Scoring,
    Stopping,
};
pub use speculation::{
    DraftScope, MAX_DRAFT_ROWS, Speculation, SpeculationError, Subject, draft_anchor,
};

/// A token of the model's vocabulary.
pub type TokenId = u32;
