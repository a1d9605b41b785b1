//! Backends on the demo model.

use shoal_engine::candle::{CandleBackend, CandleOptions, CandleWeights};
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;

use crate::model::demo_model;

/// The candle backend on the demo model; its pool holds one sequence of 2,080 tokens.
///
/// # Panics
/// If the model is not there or does not load.
pub fn demo_backend(weights: CandleWeights) -> CandleBackend {
    let gguf = Gguf::open(&demo_model()).expect("the demo model opens");
    candle(&gguf, weights)
}

/// The candle backend on a model; its pool holds one sequence of 2,080 tokens.
///
/// # Panics
/// If the model does not load.
pub fn candle(gguf: &Gguf, weights: CandleWeights) -> CandleBackend {
    let spec = ModelSpec::from_gguf(gguf).expect("the model is supported");
    let options = CandleOptions {
        weights,
        device: candle_core::Device::Cpu,
        pages: 65,
        max_rows: 256,
        max_logit_rows: 256,
    };
    CandleBackend::load(gguf, spec, options).expect("the model loads")
}
