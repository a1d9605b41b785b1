//! From a model file to a backend and a tokenizer.

use std::sync::Arc;

use candle_core::Device;
use shoal_core::{Class, MAX_DRAFT_ROWS, PAGE_TOKENS, Speculation};
use shoal_engine::backend::{Backend, BackendError};
use shoal_engine::candle::{CandleBackend, CandleOptions, CandleWeights};
use shoal_engine::cpu::{CpuBackend, CpuOptions, ShardPlan};
use shoal_engine::spec::{ModelSpec, SpecError};
use shoal_gguf::{Gguf, GgufError};
use shoal_proto::worker::TokenizerBundle;
use shoal_text::{TextError, bundle_from_gguf};

use crate::config::{
    BackendKind, ConfigError, WorkerConfig, isa_name, parse_isa, parse_kv_type, parse_payload,
    parse_prompts,
};
use crate::group::{GroupBackend, GroupError, Part, Price, Watch};
use crate::memory;

/// Most bytes of the KV pool that are taken unasked.
const MOST_KV: u64 = 1 << 30;

/// A model, ready to run.
pub struct Loaded {
    /// Runs it.
    pub backend: Box<dyn Backend>,
    /// What routers need to speak to it.
    pub tokenizer: TokenizerBundle,
    /// Where it is shared among ranks.
    pub group: Option<Arc<Watch>>,
}

/// Why a file gives no model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It is no readable GGUF file.
    #[error(transparent)]
    File(#[from] GgufError),
    /// Its architecture or shape is not supported.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its tokenizer is not supported.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Its ranks did not come together.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Rank 0 named a setting of another version.
    #[error(transparent)]
    Setting(#[from] ConfigError),
    /// The backend refused it.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl LoadError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Backend(error) => error.class(),
            Self::Group(error) => error.class(),
            _ => Class::Fatal,
        }
    }
}

/// Loads the model that the configuration names.
///
/// # Errors
/// When the file is broken, unsupported, or larger than the memory that is available.
pub(crate) fn model(config: &WorkerConfig) -> Result<Loaded, LoadError> {
    within(memory::available(), config)
}

/// [`model`] within so many bytes, where they are known.
pub(crate) fn within(available: Option<u64>, config: &WorkerConfig) -> Result<Loaded, LoadError> {
    let gguf = Gguf::open(&config.model)?;
    let mut spec = ModelSpec::from_gguf(&gguf)?;
    spec.context = spec.context.min(config.context.unwrap_or(usize::MAX));
    let tokenizer = bundle_from_gguf(&gguf)?;
    let weights: u64 = gguf.tensors().map(|tensor| tensor.data.len() as u64).sum();
    let pages = pages(config, &spec, weights, available)?;
    let max_rows = config.engine.step_rows;
    // Every row of a draft wants logits, too.
    let drafts = match config.engine.speculation {
        Speculation::Off => 0,
        Speculation::Auto | Speculation::Fixed(_) => MAX_DRAFT_ROWS as usize,
    };
    let max_logit_rows = (config.engine.max_running + drafts).min(max_rows);
    let (isa, prompts) = config.kernels();
    let mut group = None;
    let backend: Box<dyn Backend> = match (config.backend, &config.tensor_parallel) {
        (BackendKind::Cpu, None) => {
            let options = CpuOptions {
                isa,
                prompts,
                threads: config.rank_threads(),
                kv: config.kv(),
                pages,
                max_rows,
                max_logit_rows,
            };
            Box::new(CpuBackend::load(&gguf, spec, options)?)
        }
        (BackendKind::Cpu, Some(settings)) => {
            let part = Part {
                model: config.model.clone(),
                rank: 0,
                world: settings.ranks,
                context: spec.context,
                isa: isa_name(isa).to_owned(),
                prompts: prompts.name().to_owned(),
                threads: config.rank_threads(),
                kv: config.kv().name().to_owned(),
                payload: settings.payload().name().to_owned(),
                pages,
                max_rows,
                max_logit_rows,
            };
            let price = Price {
                plan: plan_of(&spec, &part)?,
                spec: spec.clone(),
                weights,
                threads: part.threads,
            };
            let watch = Arc::clone(group.insert(Arc::new(Watch::new())));
            let backend = GroupBackend::start(settings, part, price, watch, &gguf, spec)?;
            Box::new(backend)
        }
        (BackendKind::Candle, _) => {
            let options = CandleOptions {
                weights: CandleWeights::Quantized,
                device: Device::Cpu,
                pages,
                max_rows,
                max_logit_rows,
            };
            Box::new(CandleBackend::load(&gguf, spec, options)?)
        }
    };
    Ok(Loaded {
        backend,
        tokenizer,
        group,
    })
}

/// Loads what rank 0 says.
pub(crate) fn rank(part: &Part) -> Result<CpuBackend, LoadError> {
    let gguf = Gguf::open(&part.model)?;
    let mut spec = ModelSpec::from_gguf(&gguf)?;
    spec.context = part.context;
    rank_of(&gguf, spec, part)
}

/// How the ranks of a group split a model.
fn plan_of(spec: &ModelSpec, part: &Part) -> Result<ShardPlan, LoadError> {
    let plan = ShardPlan::new(spec, part.world).map_err(BackendError::from)?;
    Ok(plan.with_payload(parse_payload(&part.payload)?))
}

/// Loads a rank's part of a model.
pub(crate) fn rank_of(gguf: &Gguf, spec: ModelSpec, part: &Part) -> Result<CpuBackend, LoadError> {
    let options = CpuOptions {
        isa: parse_isa(&part.isa)?,
        prompts: parse_prompts(&part.prompts)?,
        threads: part.threads,
        kv: parse_kv_type(&part.kv)?,
        pages: part.pages,
        max_rows: part.max_rows,
        max_logit_rows: part.max_logit_rows,
    };
    let shards = plan_of(&spec, part)?;
    if part.rank >= part.world {
        return Err(GroupError::Order.into());
    }
    Ok(CpuBackend::load_rank(
        gguf, spec, options, shards, part.rank,
    )?)
}

/// Pages of the KV pool, after a check that they and the weights fit; between machines, this
/// one's equal share of both.
fn pages(
    config: &WorkerConfig,
    spec: &ModelSpec,
    weights: u64,
    available: Option<u64>,
) -> Result<u32, LoadError> {
    let page = CpuBackend::page_bytes(spec, config.kv()) as u64;
    let context = spec.context.div_ceil(PAGE_TOKENS) as u64 * page;
    let available = available.unwrap_or(u64::MAX);
    let kv = config
        .kv_bytes
        .unwrap_or_else(|| (available / 4).min(MOST_KV).max(context.min(MOST_KV)));
    let needed = weights.saturating_add(kv) / config.machines() as u64;
    if needed > available {
        return Err(LoadError::Backend(BackendError::OutOfMemory {
            what: "weights and KV pages",
            needed,
            available,
        }));
    }
    Ok(u32::try_from(kv / page).unwrap_or(u32::MAX).max(1))
}
