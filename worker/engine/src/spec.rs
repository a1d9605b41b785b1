//! The shape of a model, read from its file once and shared by every backend.

mod error;
mod keys;
mod parse;
mod rope;
mod tensors;
#[cfg(test)]
mod tests;

pub use error::SpecError;
pub use rope::{Rope, RopeKind};

/// Families of decoder-only transformers that the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1–3 and Mistral (`llama` in GGUF).
    Llama,
    /// Qwen 2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen 3: RMS norm on each head of q and k.
    Qwen3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// `general.architecture` in GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family.
    pub architecture: Architecture,
    /// `general.name` of the file, or its architecture.
    pub name: String,
    /// Most common weight type, as GGUF names it: `Q4_1`.
    pub quantization: String,
    /// Transformer blocks.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_kv_head: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub d_ff: usize,
    /// Tokens of the vocabulary: rows of the embedding.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Position embedding.
    pub rope: Rope,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// Heads of q and k are normalised before the rotation.
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tied_head: bool,
}

impl ModelSpec {
    /// The shape of what has no weights, for a backend that makes logits in another way: one layer
    /// of width 1.
    pub fn weightless(name: &str, vocab: usize, context: usize) -> Self {
        Self {
            architecture: Architecture::Llama,
            name: name.into(),
            quantization: "F32".into(),
            n_layer: 1,
            d_model: 1,
            n_head: 1,
            n_kv_head: 1,
            head_dim: 1,
            d_ff: 1,
            vocab,
            context,
            rope: Rope {
                kind: RopeKind::Halves,
                inv_freq: Vec::new(),
                magnitude: 1.0,
            },
            rms_eps: 1e-5,
            qkv_bias: false,
            qk_norm: false,
            tied_head: true,
        }
    }
}
