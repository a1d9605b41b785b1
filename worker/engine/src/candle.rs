//! The portable backend, on `candle-core`: every quantization and device that candle knows.
//! With its weights dequantised to `f32` it is the oracle that other backends are tested
//! against.
//!
//! It does not hold the law of equal bits: candle chooses its kernels by the shape of the
//! batch.

mod model;
mod plan;

use candle_core::Device;
use sha2::{Digest, Sha256};
use shoal_core::PAGE_TOKENS;
use shoal_gguf::Gguf;

use crate::backend::{Backend, BackendError, Batch, NumericsId};
use crate::digest::weights_digest;
use crate::spec::ModelSpec;
use model::Model;
use plan::StepPlan;

/// Raised whenever the arithmetic of this backend changes.
const NUMERICS_VERSION: u32 = 1;

/// How the weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CandleWeights {
    /// As the file has them; activations are quantised to 8 bits for the products.
    Quantized,
    /// Dequantised to `f32` at load, every product in `f32`.
    F32,
}

/// How a [`CandleBackend`] is built.
#[derive(Clone, Debug)]
pub struct CandleOptions {
    /// How the weights are held.
    pub weights: CandleWeights,
    /// Where the model runs.
    pub device: Device,
    /// Pages of the KV pool, in `f32`.
    pub pages: u32,
    /// Most rows of one step.
    pub max_rows: usize,
    /// Most rows of one step that want logits.
    pub max_logit_rows: usize,
}

/// See the [module](self).
pub struct CandleBackend {
    spec: ModelSpec,
    options: CandleOptions,
    numerics_id: NumericsId,
    model: Model,
}

impl CandleBackend {
    /// Loads the weights and allocates the KV pool.
    ///
    /// # Errors
    /// [`BackendError::Weights`] for a tensor that candle cannot take,
    /// [`BackendError::Device`] where the device fails.
    pub fn load(
        gguf: &Gguf,
        spec: ModelSpec,
        options: CandleOptions,
    ) -> Result<Self, BackendError> {
        let model = Model::load(gguf, &spec, &options)?;
        let mut sha = Sha256::new();
        sha.update(weights_digest(gguf, &spec));
        sha.update("candle");
        sha.update([options.weights as u8]);
        sha.update(NUMERICS_VERSION.to_le_bytes());
        Ok(Self {
            spec,
            options,
            numerics_id: NumericsId(sha.finalize().into()),
            model,
        })
    }
}

impl Backend for CandleBackend {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn numerics_id(&self) -> NumericsId {
        self.numerics_id
    }

    fn pages(&self) -> u32 {
        self.options.pages
    }

    fn max_rows(&self) -> usize {
        self.options.max_rows
    }

    fn max_logit_rows(&self) -> usize {
        self.options.max_logit_rows
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        batch.fits(self.options.max_rows, self.options.max_logit_rows)?;
        if batch.tokens.is_empty() {
            return Ok(());
        }
        let plan = StepPlan::new(batch, &self.spec, &self.options.device).map_err(device_error)?;
        let wanted = self.model.forward(&plan).map_err(device_error)?;
        if let Some(wanted) = wanted {
            let values = wanted.flatten_all().and_then(|all| all.to_vec1::<f32>());
            let values = values.map_err(device_error)?;
            logits[..values.len()].copy_from_slice(&values);
        }
        Ok(())
    }
}

/// Token slots of a KV pool of `pages` pages.
fn kv_slots(pages: u32) -> usize {
    pages as usize * PAGE_TOKENS
}

fn device_error(error: candle_core::Error) -> BackendError {
    BackendError::Device(error.into())
}
