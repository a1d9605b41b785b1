//! Small models of random weights, complete enough to be served: for tests and benchmarks.

mod random;
mod vocabulary;

use crate::reader::data_len;
use crate::{GgmlType, GgufError, GgufWriter, quantize};
use random::Random;
pub use vocabulary::{CHAT_TEMPLATE, MIN_VOCAB};

/// The architecture of a test model, as `general.architecture` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `llama`.
    Llama,
    /// `qwen2`.
    Qwen2,
    /// `qwen3`: with RMS norms on the heads of q and k.
    Qwen3,
}

impl Family {
    /// As in `general.architecture`, and the prefix of the architecture's keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The pre-tokenizer that models of the family name.
    fn pre_tokenizer(self) -> &'static str {
        match self {
            Self::Llama => "smollm",
            Self::Qwen2 | Self::Qwen3 => "qwen2",
        }
    }
}

/// How rotary frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by a factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// The factor.
        factor: f32,
        /// The context that the model was trained for.
        original_context: u32,
    },
    /// Llama 3.1: a divisor per frequency, in the tensor `rope_freqs.weight`.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f32,
        /// The context that the model was trained for.
        original_context: u32,
    },
}

/// The recipe of a test model. Equal recipes make equal files.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // Each is what its name says.
pub struct TestModel {
    pub family: Family,
    pub layers: usize,
    pub d_model: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub d_ff: usize,
    /// At least [`MIN_VOCAB`].
    pub vocab: usize,
    pub context: u32,
    pub rope_base: f32,
    pub rope_scaling: RopeScaling,
    /// The head is the embedding.
    pub tied_head: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The type of every matrix that `mix` does not name.
    pub weights: GgmlType,
    /// Types of the matrices whose names end so, such as `attn_v.weight`; the first match
    /// holds.
    pub mix: Vec<(String, GgmlType)>,
    pub seed: u64,
}

impl TestModel {
    /// Two layers of width 256, which every weight type fits, and 512 tokens.
    pub fn tiny(family: Family, weights: GgmlType) -> Self {
        Self {
            family,
            layers: 2,
            d_model: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            d_ff: 512,
            vocab: 512,
            context: 512,
            rope_base: 10_000.0,
            rope_scaling: RopeScaling::None,
            tied_head: family == Family::Llama,
            qkv_bias: family == Family::Qwen2,
            weights,
            mix: Vec::new(),
            seed: 1,
        }
    }

    /// Makes the model.
    ///
    /// # Errors
    /// If the rows of a matrix are no whole number of blocks of its type.
    ///
    /// # Panics
    /// If the vocabulary is smaller than [`MIN_VOCAB`].
    pub fn build(&self) -> Result<GgufWriter<'static>, GgufError> {
        let mut file = GgufWriter::new();
        self.add_shape(&mut file)?;
        vocabulary::add(&mut file, self.vocab, self.family.pre_tokenizer())?;
        let mut tensors = Tensors {
            recipe: self,
            random: Random::new(self.seed),
            file,
        };
        tensors.add_all()?;
        Ok(tensors.file)
    }

    fn add_shape(&self, file: &mut GgufWriter<'_>) -> Result<(), GgufError> {
        let family = self.family.name();
        file.metadata("general.architecture", family)?;
        file.metadata("general.name", format!("test {family} {}", self.weights))?;
        let mut number =
            |key: &str, value: usize| file.metadata(&format!("{family}.{key}"), value as u32);
        number("block_count", self.layers)?;
        number("context_length", self.context as usize)?;
        number("embedding_length", self.d_model)?;
        number("feed_forward_length", self.d_ff)?;
        number("attention.head_count", self.heads)?;
        number("attention.head_count_kv", self.kv_heads)?;
        number("attention.key_length", self.head_dim)?;
        number("attention.value_length", self.head_dim)?;
        number("rope.dimension_count", self.head_dim)?;
        number("vocab_size", self.vocab)?;
        let key = |key: &str| format!("{family}.{key}");
        file.metadata(&key("attention.layer_norm_rms_epsilon"), 1e-5f32)?;
        file.metadata(&key("rope.freq_base"), self.rope_base)?;
        match self.rope_scaling {
            RopeScaling::None | RopeScaling::Llama3 { .. } => {}
            RopeScaling::Linear { factor } => {
                file.metadata(&key("rope.scaling.type"), "linear")?;
                file.metadata(&key("rope.scaling.factor"), factor)?;
            }
            RopeScaling::Yarn {
                factor,
                original_context,
            } => {
                file.metadata(&key("rope.scaling.type"), "yarn")?;
                file.metadata(&key("rope.scaling.factor"), factor)?;
                let original = key("rope.scaling.original_context_length");
                file.metadata(&original, original_context)?;
            }
        }
        Ok(())
    }

    /// The type of a matrix.
    fn type_of(&self, name: &str) -> GgmlType {
        let named = self.mix.iter().find(|(suffix, _)| name.ends_with(suffix));
        named.map_or(self.weights, |&(_, ty)| ty)
    }
}

struct Tensors<'a> {
    recipe: &'a TestModel,
    random: Random,
    file: GgufWriter<'static>,
}

impl Tensors<'_> {
    fn add_all(&mut self) -> Result<(), GgufError> {
        let m = self.recipe;
        let (q, kv) = (m.heads * m.head_dim, m.kv_heads * m.head_dim);
        self.matrix("token_embd.weight", m.vocab, m.d_model)?;
        if let RopeScaling::Llama3 {
            factor,
            original_context,
        } = m.rope_scaling
        {
            let divisors = llama3_divisors(m.head_dim, m.rope_base, factor, original_context);
            self.vector("rope_freqs.weight", &divisors)?;
        }
        for layer in 0..m.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            self.norm(&name("attn_norm.weight"), m.d_model)?;
            for (part, rows) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
                self.matrix(&name(&format!("{part}.weight")), rows, m.d_model)?;
                if m.qkv_bias {
                    let bias = self.random.normals(rows, 0.1);
                    self.vector(&name(&format!("{part}.bias")), &bias)?;
                }
            }
            if m.family == Family::Qwen3 {
                self.norm(&name("attn_q_norm.weight"), m.head_dim)?;
                self.norm(&name("attn_k_norm.weight"), m.head_dim)?;
            }
            self.matrix(&name("attn_output.weight"), m.d_model, q)?;
            self.norm(&name("ffn_norm.weight"), m.d_model)?;
            self.matrix(&name("ffn_gate.weight"), m.d_ff, m.d_model)?;
            self.matrix(&name("ffn_up.weight"), m.d_ff, m.d_model)?;
            self.matrix(&name("ffn_down.weight"), m.d_model, m.d_ff)?;
        }
        self.norm("output_norm.weight", m.d_model)?;
        if !m.tied_head {
            self.matrix("output.weight", m.vocab, m.d_model)?;
        }
        Ok(())
    }

    /// Weights of variance `1 / columns`: what goes in with unit variance comes out with it.
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<(), GgufError> {
        let (ty, shape) = (self.recipe.type_of(name), [rows, columns]);
        if let Err(fault) = data_len(ty, &shape) {
            let name = name.to_owned();
            return Err(GgufError::Tensor { name, fault });
        }
        let deviation = (columns as f32).sqrt().recip();
        let weights = self.random.normals(rows * columns, deviation);
        self.file.tensor(name, ty, &shape, quantize(ty, &weights))
    }

    /// Weights around 1.
    fn norm(&mut self, name: &str, len: usize) -> Result<(), GgufError> {
        let mut weights = self.random.normals(len, 0.1);
        weights.iter_mut().for_each(|weight| *weight += 1.0);
        self.vector(name, &weights)
    }

    fn vector(&mut self, name: &str, weights: &[f32]) -> Result<(), GgufError> {
        let data = quantize(GgmlType::F32, weights);
        self.file
            .tensor(name, GgmlType::F32, &[weights.len()], data)
    }
}

/// What Llama 3.1 divides each frequency by, from its turns over the original context: 4 and
/// more stay as they are, 1 and fewer are divided by `factor`, and a blend lies between.
fn llama3_divisors(head_dim: usize, base: f32, factor: f32, original_context: u32) -> Vec<f32> {
    const LOW: f32 = 1.0;
    const HIGH: f32 = 4.0;
    (0..head_dim / 2)
        .map(|pair| {
            let frequency = base.powf(-2.0 * pair as f32 / head_dim as f32);
            let turns = original_context as f32 * frequency / std::f32::consts::TAU;
            let share = ((turns - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
            ((1.0 - share) / factor + share).recip()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gguf;

    #[test]
    fn every_family_and_type_is_a_valid_file() {
        for family in [Family::Llama, Family::Qwen2, Family::Qwen3] {
            for ty in GgmlType::all() {
                let mut model = TestModel::tiny(family, ty);
                model.layers = 1;
                let gguf = Gguf::parse(model.build().unwrap().to_bytes()).unwrap();
                assert_eq!(
                    gguf.require::<&str>("general.architecture").unwrap(),
                    family.name()
                );
                let q = gguf.tensor("blk.0.attn_q.weight").unwrap();
                assert_eq!((q.ty, q.shape), (ty, &[256, 256][..]));
                let bias = gguf.tensor("blk.0.attn_v.bias");
                assert_eq!(bias.is_some(), family == Family::Qwen2);
                let head_norm = gguf.tensor("blk.0.attn_k_norm.weight");
                assert_eq!(head_norm.is_some(), family == Family::Qwen3);
                let head = gguf.tensor("output.weight");
                assert_eq!(head.is_some(), family != Family::Llama);
            }
        }
    }

    #[test]
    fn equal_recipes_make_equal_files() {
        let model = TestModel::tiny(Family::Llama, GgmlType::Q4_0);
        let bytes = model.build().unwrap().to_bytes();
        assert_eq!(model.build().unwrap().to_bytes(), bytes);
        let other = TestModel { seed: 2, ..model };
        assert_ne!(other.build().unwrap().to_bytes(), bytes);
    }

    #[test]
    fn the_mix_names_matrices() {
        let mut model = TestModel::tiny(Family::Llama, GgmlType::Q4_K);
        model.mix = vec![("attn_v.weight".to_owned(), GgmlType::Q6_K)];
        let gguf = Gguf::parse(model.build().unwrap().to_bytes()).unwrap();
        let ty = |name: &str| gguf.tensor(name).unwrap().ty;
        assert_eq!(ty("blk.1.attn_v.weight"), GgmlType::Q6_K);
        assert_eq!(ty("blk.1.attn_q.weight"), GgmlType::Q4_K);
    }

    #[test]
    fn narrow_rows_do_not_fit_super_blocks() {
        let mut model = TestModel::tiny(Family::Llama, GgmlType::Q4_K);
        model.d_model = 64;
        let error = model.build().err().unwrap();
        assert_eq!(
            error.to_string(),
            "tensor `token_embd.weight`: has rows of 64 weights, no whole number of Q4_K blocks"
        );
    }

    /// The ends of Llama 3.1's own table: base 500000, 128 wide, factor 8 over 8192.
    #[test]
    fn llama3_divides_low_frequencies_alone() {
        let divisors = llama3_divisors(128, 500_000.0, 8.0, 8192);
        assert_eq!(divisors[..25], [1.0; 25]);
        assert_eq!(divisors[40..], [8.0; 24]);
        assert!(divisors.is_sorted());
    }

    #[test]
    fn scaling_is_in_the_file() {
        let mut model = TestModel::tiny(Family::Llama, GgmlType::F32);
        model.rope_scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_context: 128,
        };
        let gguf = Gguf::parse(model.build().unwrap().to_bytes()).unwrap();
        let original: u32 = gguf
            .require("llama.rope.scaling.original_context_length")
            .unwrap();
        assert_eq!(original, 128);
        model.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            original_context: 128,
        };
        let gguf = Gguf::parse(model.build().unwrap().to_bytes()).unwrap();
        assert_eq!(gguf.tensor("rope_freqs.weight").unwrap().shape, [32]);
    }
}
