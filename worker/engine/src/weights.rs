//! The tensors of a model: their names in the file and their shapes.

use std::fmt;

use crate::spec::ModelSpec;

/// One tensor of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weight {
    /// Token embedding `[vocab, d_model]`; also the head where it is tied.
    Embedding,
    /// RMS norm before the head `[d_model]`.
    OutputNorm,
    /// Head `[vocab, d_model]`, where it is not tied.
    Head,
    /// A tensor of a transformer block.
    Layer(usize, LayerWeight),
}

/// A tensor of a transformer block. Matrices are `[outputs, inputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerWeight {
    /// RMS norm before attention `[d_model]`.
    AttnNorm,
    /// Query projection `[n_head * head_dim, d_model]`.
    Q,
    /// Key projection `[n_kv_head * head_dim, d_model]`.
    K,
    /// Value projection `[n_kv_head * head_dim, d_model]`.
    V,
    /// Bias of `Q`.
    QBias,
    /// Bias of `K`.
    KBias,
    /// Bias of `V`.
    VBias,
    /// RMS norm of each query head `[head_dim]`.
    QNorm,
    /// RMS norm of each key head `[head_dim]`.
    KNorm,
    /// Attention output projection `[d_model, n_head * head_dim]`.
    AttnOutput,
    /// RMS norm before the feed-forward layer `[d_model]`.
    FfnNorm,
    /// Gate of the feed-forward layer `[d_ff, d_model]`.
    Gate,
    /// Up projection of the feed-forward layer `[d_ff, d_model]`.
    Up,
    /// Down projection of the feed-forward layer `[d_model, d_ff]`.
    Down,
}

impl LayerWeight {
    const ALL: [Self; 14] = [
        Self::AttnNorm,
        Self::Q,
        Self::K,
        Self::V,
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::QNorm,
        Self::KNorm,
        Self::AttnOutput,
        Self::FfnNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    fn suffix(self) -> &'static str {
        match self {
            Self::AttnNorm => "attn_norm.weight",
            Self::Q => "attn_q.weight",
            Self::K => "attn_k.weight",
            Self::V => "attn_v.weight",
            Self::QBias => "attn_q.bias",
            Self::KBias => "attn_k.bias",
            Self::VBias => "attn_v.bias",
            Self::QNorm => "attn_q_norm.weight",
            Self::KNorm => "attn_k_norm.weight",
            Self::AttnOutput => "attn_output.weight",
            Self::FfnNorm => "ffn_norm.weight",
            Self::Gate => "ffn_gate.weight",
            Self::Up => "ffn_up.weight",
            Self::Down => "ffn_down.weight",
        }
    }

    fn is_in(self, spec: &ModelSpec) -> bool {
        match self {
            Self::QBias | Self::KBias | Self::VBias => spec.qkv_bias,
            Self::QNorm | Self::KNorm => spec.qk_norm,
            _ => true,
        }
    }
}

impl Weight {
    /// Every tensor that a model of this shape has, in the order of execution.
    pub fn all(spec: &ModelSpec) -> impl Iterator<Item = Self> {
        let layers = (0..spec.n_layer).flat_map(move |layer| {
            LayerWeight::ALL
                .into_iter()
                .filter(|weight| weight.is_in(spec))
                .map(move |weight| Self::Layer(layer, weight))
        });
        std::iter::once(Self::Embedding)
            .chain(layers)
            .chain([Self::OutputNorm])
            .chain((!spec.tied_head).then_some(Self::Head))
    }

    /// Its shape, rows first.
    pub fn shape(self, spec: &ModelSpec) -> Vec<usize> {
        let (q, kv) = (spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim);
        let layer = match self {
            Self::Embedding | Self::Head => return vec![spec.vocab, spec.d_model],
            Self::OutputNorm => return vec![spec.d_model],
            Self::Layer(_, layer) => layer,
        };
        match layer {
            LayerWeight::AttnNorm | LayerWeight::FfnNorm => vec![spec.d_model],
            LayerWeight::Q => vec![q, spec.d_model],
            LayerWeight::K | LayerWeight::V => vec![kv, spec.d_model],
            LayerWeight::QBias => vec![q],
            LayerWeight::KBias | LayerWeight::VBias => vec![kv],
            LayerWeight::QNorm | LayerWeight::KNorm => vec![spec.head_dim],
            LayerWeight::AttnOutput => vec![spec.d_model, q],
            LayerWeight::Gate | LayerWeight::Up => vec![spec.d_ff, spec.d_model],
            LayerWeight::Down => vec![spec.d_model, spec.d_ff],
        }
    }
}

/// The tensor's name in a GGUF file.
impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("token_embd.weight"),
            Self::OutputNorm => f.write_str("output_norm.weight"),
            Self::Head => f.write_str("output.weight"),
            Self::Layer(layer, weight) => write!(f, "blk.{layer}.{}", weight.suffix()),
        }
    }
}
