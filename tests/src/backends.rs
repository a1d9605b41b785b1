//! The backends, each with a pool that holds one sequence of 2,080 tokens.

use shoal_engine::candle::{CandleBackend, CandleOptions, CandleWeights};
use shoal_engine::cpu::{CpuBackend, CpuOptions};
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;

use crate::model::demo_model;

/// 65 pages of 32 tokens.
const PAGES: u32 = 65;

/// Rows of a step, and rows that want logits.
const ROWS: usize = 256;

/// The demo model.
///
/// # Panics
/// If it is not there.
pub fn demo_gguf() -> Gguf {
    Gguf::open(&demo_model()).expect("the demo model opens")
}

/// The candle backend on the CPU: the oracle with [`CandleWeights::F32`].
///
/// # Panics
/// If the model does not load.
pub fn candle(gguf: &Gguf, weights: CandleWeights) -> CandleBackend {
    let spec = ModelSpec::from_gguf(gguf).expect("the model is supported");
    let options = CandleOptions {
        weights,
        device: candle_core::Device::Cpu,
        pages: PAGES,
        max_rows: ROWS,
        max_logit_rows: ROWS,
    };
    CandleBackend::load(gguf, spec, options).expect("the model loads")
}

/// The engine's own backend, with the best instruction set of the machine.
///
/// # Panics
/// If the model does not load.
pub fn cpu(gguf: &Gguf) -> CpuBackend {
    cpu_as(gguf, Isa::detect(), 2)
}

/// The engine's own backend.
///
/// # Panics
/// If the model does not load.
pub fn cpu_as(gguf: &Gguf, isa: Isa, threads: usize) -> CpuBackend {
    let spec = ModelSpec::from_gguf(gguf).expect("the model is supported");
    let options = CpuOptions {
        isa,
        threads,
        pages: PAGES,
        max_rows: ROWS,
        max_logit_rows: ROWS,
    };
    CpuBackend::load(gguf, spec, options).expect("the model loads")
}
