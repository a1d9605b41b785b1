//! From the metadata of a GGUF file to a [`ModelSpec`].

use shoal_gguf::{GgmlType, Gguf, dequantize};

use super::keys::Keys;
use super::rope::{RopeConfig, RopeKind, Scaling};
use super::tensors::{most_common_matrix_type, validate_tensors};
use super::{Architecture, ModelSpec, Rope, SpecError};
use crate::weights::{LayerWeight, Weight};

// Far above every published model of these families; they keep products of dimensions
// within 64 bits, and a hostile file from asking for absurd buffers.
const MAX_LAYERS: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 17;
const MAX_FF: usize = 1 << 19;
const MAX_HEADS: usize = 1 << 11;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 21;
const MAX_CONTEXT: usize = 1 << 24;

/// Frequency divisors of the rotary embedding.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";

impl ModelSpec {
    /// Reads the shape of the model and checks every tensor against it.
    ///
    /// # Errors
    /// [`SpecError`]: the architecture or a feature is not supported, or the file
    /// contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, SpecError> {
        let architecture = architecture(gguf)?;
        let keys = Keys::new(gguf, architecture);
        refuse_unsupported(&keys)?;

        let d_model = keys.required_count("embedding_length", MAX_WIDTH)?;
        let n_head = keys.required_count("attention.head_count", MAX_HEADS)?;
        let n_kv_head = keys
            .count("attention.head_count_kv", MAX_HEADS)?
            .unwrap_or(n_head);
        if !n_head.is_multiple_of(n_kv_head) {
            return Err(SpecError::Invalid {
                key: keys.key("attention.head_count_kv"),
                reason: format!("{n_kv_head} does not divide the {n_head} query heads"),
            });
        }
        let head_dim = head_dim(&keys, d_model, n_head)?;
        let context = keys.required_count("context_length", MAX_CONTEXT)?;
        let rope = rope(gguf, &keys, head_dim, context)?;
        let rms_eps = keys
            .positive("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| SpecError::Missing(keys.key("attention.layer_norm_rms_epsilon")))?;
        // Inside its window, windowed attention is full attention.
        let window = keys.switch("attention.sliding_window")? as usize;
        let context = if window == 0 {
            context
        } else {
            context.min(window)
        };

        let spec = Self {
            architecture,
            name: gguf
                .get::<&str>("general.name")?
                .unwrap_or(architecture.name())
                .to_owned(),
            quantization: most_common_matrix_type(gguf)
                .unwrap_or(GgmlType::F32)
                .to_string(),
            n_layer: keys.required_count("block_count", MAX_LAYERS)?,
            d_model,
            n_head,
            n_kv_head,
            head_dim,
            d_ff: keys.required_count("feed_forward_length", MAX_FF)?,
            vocab: vocab(gguf)?,
            context,
            rope,
            rms_eps: rms_eps as f32,
            qkv_bias: has(gguf, Weight::Layer(0, LayerWeight::QBias)),
            qk_norm: architecture == Architecture::Qwen3,
            tied_head: !has(gguf, Weight::Head),
        };
        validate_tensors(gguf, &spec)?;
        Ok(spec)
    }
}

fn has(gguf: &Gguf, weight: Weight) -> bool {
    gguf.tensor(&weight.to_string()).is_some()
}

fn architecture(gguf: &Gguf) -> Result<Architecture, SpecError> {
    const KEY: &str = "general.architecture";
    let name = gguf
        .get::<&str>(KEY)?
        .ok_or_else(|| SpecError::Missing(KEY.to_owned()))?;
    Architecture::ALL
        .into_iter()
        .find(|architecture| architecture.name() == name)
        .ok_or_else(|| SpecError::UnknownArchitecture(name.to_owned()))
}

/// What some files of these architectures ask for and no backend does.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), SpecError> {
    let experts = keys.switch("expert_count")?;
    if experts > 0 {
        return Err(keys.unsupported("mixture of experts", "expert_count", experts));
    }
    for (feature, name) in [
        ("a scale of its own for attention", "attention.scale"),
        (
            "DeepSeek's variant of YaRN",
            "rope.scaling.yarn_log_multiplier",
        ),
    ] {
        if let Some(value) = keys.positive(name)? {
            return Err(keys.unsupported(feature, name, value));
        }
    }
    Ok(())
}

fn head_dim(keys: &Keys<'_>, d_model: usize, n_head: usize) -> Result<usize, SpecError> {
    const KEY: &str = "attention.key_length";
    let head_dim = keys.count(KEY, MAX_HEAD_DIM)?.unwrap_or(d_model / n_head);
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(SpecError::Invalid {
            key: keys.key(KEY),
            reason: format!("a head of {head_dim} elements has no pairs to rotate"),
        });
    }
    let value_length = keys
        .count("attention.value_length", MAX_HEAD_DIM)?
        .unwrap_or(head_dim);
    if value_length != head_dim {
        let feature = "a value head of another width than the key head";
        return Err(keys.unsupported(feature, "attention.value_length", value_length));
    }
    Ok(head_dim)
}

fn vocab(gguf: &Gguf) -> Result<usize, SpecError> {
    let tensor = Weight::Embedding.to_string();
    let error = |reason: String| SpecError::Tensor {
        tensor: tensor.clone(),
        reason,
    };
    let embedding = gguf
        .tensor(&tensor)
        .ok_or_else(|| error("is missing".to_owned()))?;
    match embedding.shape.first() {
        Some(&rows) if (1..=MAX_VOCAB).contains(&rows) => Ok(rows),
        _ => Err(error(format!("has no 1 to {MAX_VOCAB} rows"))),
    }
}

fn rope(gguf: &Gguf, keys: &Keys<'_>, head_dim: usize, context: usize) -> Result<Rope, SpecError> {
    const DIMS: &str = "rope.dimension_count";
    let dims = keys.count(DIMS, MAX_HEAD_DIM)?.unwrap_or(head_dim);
    if dims > head_dim || !dims.is_multiple_of(2) {
        return Err(SpecError::Invalid {
            key: keys.key(DIMS),
            reason: format!("{dims} elements cannot rotate in a head of {head_dim}"),
        });
    }
    const BASE: &str = "rope.freq_base";
    let base = keys.positive(BASE)?.unwrap_or(10_000.0);
    if base <= 1.0 {
        return Err(SpecError::Invalid {
            key: keys.key(BASE),
            reason: format!("{base} is not above 1"),
        });
    }
    Ok(RopeConfig {
        kind: match keys.architecture() {
            // The converter permutes the rows of q and k to interleaved pairs.
            Architecture::Llama => RopeKind::Interleaved,
            Architecture::Qwen2 | Architecture::Qwen3 => RopeKind::Halves,
        },
        dims,
        base,
        scaling: scaling(keys, context)?,
        attention_factor: keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0),
        divisors: divisors(gguf, dims / 2)?,
    }
    .resolve())
}

fn scaling(keys: &Keys<'_>, context: usize) -> Result<Scaling, SpecError> {
    const TYPE: &str = "rope.scaling.type";
    let factor = match keys.positive("rope.scaling.factor")? {
        Some(factor) => factor,
        None => keys.positive("rope.scale_linear")?.unwrap_or(1.0),
    };
    match keys.text(TYPE)?.unwrap_or("linear") {
        "none" => Ok(Scaling::Linear { factor: 1.0 }),
        "linear" => Ok(Scaling::Linear { factor }),
        "yarn" => {
            const EXTRAPOLATION: &str = "rope.scaling.yarn_ext_factor";
            match keys.positive(EXTRAPOLATION)? {
                None | Some(1.0) => {}
                Some(other) => {
                    return Err(keys.unsupported("partial YaRN", EXTRAPOLATION, other));
                }
            }
            let original = keys.count("rope.scaling.original_context_length", MAX_CONTEXT)?;
            Ok(Scaling::Yarn {
                factor,
                original_context: original.unwrap_or(context) as f64,
                beta_fast: keys
                    .positive("rope.scaling.yarn_beta_fast")?
                    .unwrap_or(32.0),
                beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            })
        }
        other => Err(keys.unsupported("this scaling of positions", TYPE, other)),
    }
}

fn divisors(gguf: &Gguf, pairs: usize) -> Result<Option<Vec<f32>>, SpecError> {
    let Some(tensor) = gguf.tensor(ROPE_DIVISORS) else {
        return Ok(None);
    };
    let error = |reason: String| SpecError::Tensor {
        tensor: ROPE_DIVISORS.to_owned(),
        reason,
    };
    if tensor.ty != GgmlType::F32 || tensor.shape[..] != [pairs] {
        return Err(error(format!(
            "is no F32 vector of {pairs}, one for each pair"
        )));
    }
    let mut divisors = vec![0.0; pairs];
    dequantize(tensor.ty, tensor.data, &mut divisors);
    if divisors.iter().all(|d| d.is_finite() && *d > 0.0) {
        Ok(Some(divisors))
    } else {
        Err(error("has a divisor that is no positive number".to_owned()))
    }
}
