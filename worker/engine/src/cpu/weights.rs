//! The weights of a rank, packed once in the order of execution into one arena.

use std::ops::Range;

use shoal_gguf::Gguf;
use shoal_kernels::arena::Arena;
use shoal_kernels::gemm::{self, Placed};
use shoal_kernels::quant::Precision;
use shoal_kernels::team::Team;

use super::pack::Packer;
use super::shard::Shard;
use crate::backend::BackendError;
use crate::spec::ModelSpec;
use crate::weights::{LayerWeight, Weight};

/// A linear map: a matrix for each run of rows with one format.
#[derive(Default)]
pub(super) struct Linear {
    pub(super) parts: Vec<Placed>,
}

impl Linear {
    /// Bytes of its matrices.
    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.layout.bytes()).sum()
    }

    /// How its matrices take their inputs.
    pub(super) fn precisions(&self) -> impl Iterator<Item = Precision> {
        self.parts
            .iter()
            .map(|part| part.layout.format().precision())
    }
}

/// The weights of one block.
pub(super) struct Layer {
    pub(super) attn_norm: Vec<f32>,
    pub(super) qkv: Linear,
    pub(super) qkv_bias: Vec<f32>,
    pub(super) q_norm: Vec<f32>,
    pub(super) k_norm: Vec<f32>,
    pub(super) attn_output: Linear,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

impl Layer {
    fn place(
        packer: &mut Packer<'_>,
        spec: &ModelSpec,
        layer: usize,
        shard: &Shard,
    ) -> Result<Self, BackendError> {
        use LayerWeight::{
            AttnNorm, AttnOutput, Down, FfnNorm, Gate, K, KBias, KNorm, Q, QBias, QNorm, Up, V,
            VBias,
        };
        let at = |weight| Weight::Layer(layer, weight);
        let width = |heads: &Range<usize>| heads.start * spec.head_dim..heads.end * spec.head_dim;
        let (q, kv) = (width(&shard.q), width(&shard.kv));
        let ff = &shard.ff;
        let whole = |weight| packer.vector(at(weight), None);
        let (attn_norm, ffn_norm) = (whole(AttnNorm)?, whole(FfnNorm)?);
        let norms = |weight| {
            if spec.qk_norm {
                whole(weight)
            } else {
                Ok(Vec::new())
            }
        };
        let (q_norm, k_norm) = (norms(QNorm)?, norms(KNorm)?);
        let mut qkv_bias = Vec::new();
        for (weight, rows) in [(QBias, &q), (KBias, &kv), (VBias, &kv)] {
            if spec.qkv_bias {
                qkv_bias.extend(packer.vector(at(weight), Some(rows.clone()))?);
            }
        }
        Ok(Self {
            attn_norm,
            qkv_bias,
            q_norm,
            k_norm,
            ffn_norm,
            qkv: packer.rows(&[(at(Q), q.clone()), (at(K), kv.clone()), (at(V), kv)])?,
            attn_output: packer.columns(at(AttnOutput), q)?,
            gate_up: packer.rows(&[(at(Gate), ff.clone()), (at(Up), ff.clone())])?,
            down: packer.columns(at(Down), ff.clone())?,
        })
    }
}

/// A rank's weights of a model.
pub(super) struct Weights {
    arena: Arena,
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Vec<f32>,
    pub(super) head: Linear,
    /// `None` where it is the head.
    embedding: Option<Linear>,
    /// The rows of the two.
    vocab: Range<usize>,
}

impl Weights {
    pub(super) fn load(
        gguf: &Gguf,
        spec: &ModelSpec,
        shard: &Shard,
        team: &mut Team,
    ) -> Result<Self, BackendError> {
        let mut packer = Packer::new(gguf);
        let vocab = shard.vocab.clone();
        let embedding = match spec.tied_head {
            true => None,
            false => Some(packer.rows(&[(Weight::Embedding, vocab.clone())])?),
        };
        let layers = (0..spec.n_layer)
            .map(|layer| Layer::place(&mut packer, spec, layer, shard))
            .collect::<Result<Vec<_>, _>>()?;
        let output_norm = packer.vector(Weight::OutputNorm, None)?;
        let head = if spec.tied_head {
            Weight::Embedding
        } else {
            Weight::Head
        };
        let head = packer.rows(&[(head, vocab.clone())])?;
        let mut arena =
            Arena::new(packer.bytes()).map_err(|error| BackendError::Device(Box::new(error)))?;
        packer.pack(team, arena.as_mut_slice())?;
        Ok(Self {
            arena,
            layers,
            output_norm,
            head,
            embedding,
            vocab,
        })
    }

    /// A map at its place.
    pub(super) fn linear<'a>(&'a self, linear: &'a Linear) -> gemm::Linear<'a> {
        gemm::Linear::new(self.arena.as_slice(), &linear.parts)
    }

    /// One linear map of every layer.
    pub(super) fn each<'a>(
        &'a self,
        of: impl Fn(&'a Layer) -> &'a Linear,
    ) -> impl Iterator<Item = &'a Linear> {
        self.layers.iter().map(of)
    }

    /// The embedding of a token; zeros if another rank has it.
    pub(super) fn embed(&self, token: u32, out: &mut [f32]) {
        if !self.vocab.contains(&(token as usize)) {
            return out.fill(0.0);
        }
        let linear = self.embedding.as_ref().unwrap_or(&self.head);
        // It is one tensor, and so one matrix.
        let Placed { layout, offset } = linear.parts[0];
        let data = &self.arena.as_slice()[offset..offset + layout.bytes()];
        layout.unpack_row(data, token as usize - self.vocab.start, out);
    }
}
