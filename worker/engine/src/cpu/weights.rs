//! The weights of a model, packed once in the order of execution into one arena.

use shoal_gguf::{GgmlType, Gguf, TensorView, codec};
use shoal_kernels::arena::Arena;
use shoal_kernels::gemm::{self, Placed};
use shoal_kernels::pack::{
    Block, BlockRows, FloatRows, Format, Layout, Packing, Source, TILE, pack,
};
use shoal_kernels::quant::Precision;
use shoal_kernels::team::Team;

use crate::backend::BackendError;
use crate::spec::ModelSpec;
use crate::weights::{LayerWeight, Weight};

/// A linear map: a matrix for each run of rows with one format.
#[derive(Default)]
pub(super) struct Linear {
    parts: Vec<Placed>,
}

impl Linear {
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

/// The weights of a model.
pub(super) struct Weights {
    arena: Arena,
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Vec<f32>,
    pub(super) head: Linear,
    /// `None` where it is the head.
    embedding: Option<Linear>,
}

/// Matrices stacked by rows.
struct Stack<'a> {
    tensors: Vec<TensorView<'a>>,
}

impl<'a> Stack<'a> {
    /// The type and the bytes of a row of `k` weights.
    fn row(&self, row: usize, k: usize) -> (GgmlType, &'a [u8]) {
        let mut row = row;
        for tensor in &self.tensors {
            if row < tensor.shape[0] {
                let bytes = tensor.ty.bytes_of(k);
                return (tensor.ty, &tensor.data[row * bytes..][..bytes]);
            }
            row -= tensor.shape[0];
        }
        unreachable!("a layout has the rows of its tensors")
    }

    fn source(&self, precision: Precision) -> Source<'_> {
        match precision {
            Precision::Int8 => Source::Blocks(self),
            Precision::F32 => Source::Floats(self),
        }
    }

    fn error(&self, error: impl std::fmt::Display) -> BackendError {
        let names: Vec<&str> = self.tensors.iter().map(|tensor| tensor.name).collect();
        BackendError::Weights {
            tensor: names.join(", "),
            reason: error.to_string(),
        }
    }
}

impl BlockRows for Stack<'_> {
    fn blocks(&self, row: usize, out: &mut [Block]) {
        let (ty, data) = self.row(row, out.len() * TILE);
        codec::unpack(ty, data, |index, group| {
            out[index] = Block {
                quants: group.quants,
                scales: group.scales,
                min: group.min,
            };
        });
    }
}

impl FloatRows for Stack<'_> {
    fn floats(&self, row: usize, out: &mut [f32]) {
        let (ty, data) = self.row(row, out.len());
        shoal_gguf::dequantize(ty, data, out);
    }
}

fn format(ty: GgmlType) -> Format {
    match ty {
        GgmlType::Q4_0 => Format::U4Zero,
        GgmlType::Q4_1 | GgmlType::Q4_K => Format::U4Min,
        GgmlType::Q5_0 => Format::U8Zero(16),
        GgmlType::Q5_1 | GgmlType::Q5_K => Format::U8Min,
        GgmlType::Q6_K => Format::U8Halves(32),
        GgmlType::Q8_0 => Format::U8Zero(128),
        GgmlType::F32 => Format::F32,
        GgmlType::F16 => Format::F16,
        GgmlType::BF16 => Format::Bf16,
    }
}

/// Places matrices one after the other before the arena exists, then packs them.
struct Packer<'a> {
    gguf: &'a Gguf,
    sources: Vec<(Layout, usize, Stack<'a>)>,
    bytes: usize,
}

impl<'a> Packer<'a> {
    fn tensor(&self, weight: Weight) -> Result<TensorView<'a>, BackendError> {
        let name = weight.to_string();
        self.gguf
            .tensor(&name)
            .ok_or_else(|| BackendError::Weights {
                tensor: name,
                reason: "is missing".to_owned(),
            })
    }

    fn linear(&mut self, weights: &[Weight]) -> Result<Linear, BackendError> {
        let mut linear = Linear::default();
        let mut stack: Vec<TensorView<'a>> = Vec::new();
        for &weight in weights {
            let tensor = self.tensor(weight)?;
            if stack
                .last()
                .is_some_and(|last| format(last.ty) != format(tensor.ty))
            {
                self.place(std::mem::take(&mut stack), &mut linear)?;
            }
            stack.push(tensor);
        }
        self.place(stack, &mut linear)?;
        Ok(linear)
    }

    fn place(
        &mut self,
        tensors: Vec<TensorView<'a>>,
        linear: &mut Linear,
    ) -> Result<(), BackendError> {
        let Some(first) = tensors.first() else {
            return Ok(());
        };
        let (k, ty) = (first.shape[1], first.ty);
        let n = tensors.iter().map(|tensor| tensor.shape[0]).sum();
        let stack = Stack { tensors };
        let layout = Layout::new(n, k, format(ty)).map_err(|error| stack.error(error))?;
        linear.parts.push(Placed {
            layout,
            offset: self.bytes,
        });
        self.sources.push((layout, self.bytes, stack));
        self.bytes += layout.bytes().next_multiple_of(64);
        Ok(())
    }

    /// Packs what was placed, in that order, into `arena`.
    fn pack(&self, team: &mut Team, arena: &mut [u8]) -> Result<(), BackendError> {
        let (mut rest, mut start) = (arena, 0);
        let mut matrices = Vec::with_capacity(self.sources.len());
        for (layout, offset, stack) in &self.sources {
            let (_, tail) = rest.split_at_mut(offset - start);
            let (out, tail) = tail.split_at_mut(layout.bytes());
            matrices.push(Packing {
                layout: *layout,
                source: stack.source(layout.format().precision()),
                out,
            });
            (rest, start) = (tail, offset + layout.bytes());
        }
        pack(team, &mut matrices).map_err(|error| self.sources[error.matrix].2.error(error))
    }

    fn vector(&self, weight: Weight) -> Result<Vec<f32>, BackendError> {
        let tensor = self.tensor(weight)?;
        let mut out = vec![0.0; tensor.shape.iter().product()];
        shoal_gguf::dequantize(tensor.ty, tensor.data, &mut out);
        Ok(out)
    }

    fn layer(&mut self, spec: &ModelSpec, layer: usize) -> Result<Layer, BackendError> {
        use LayerWeight::{
            AttnNorm, AttnOutput, Down, FfnNorm, Gate, K, KBias, KNorm, Q, QBias, QNorm, Up, V,
            VBias,
        };
        let at = |weight| Weight::Layer(layer, weight);
        let optional = |there: bool, weights: &[LayerWeight]| {
            let weights = weights.iter().filter(|_| there);
            let vectors = weights.map(|&weight| self.vector(at(weight)));
            vectors.collect::<Result<Vec<_>, _>>().map(|v| v.concat())
        };
        Ok(Layer {
            attn_norm: self.vector(at(AttnNorm))?,
            qkv_bias: optional(spec.qkv_bias, &[QBias, KBias, VBias])?,
            q_norm: optional(spec.qk_norm, &[QNorm])?,
            k_norm: optional(spec.qk_norm, &[KNorm])?,
            ffn_norm: self.vector(at(FfnNorm))?,
            qkv: self.linear(&[at(Q), at(K), at(V)])?,
            attn_output: self.linear(&[at(AttnOutput)])?,
            gate_up: self.linear(&[at(Gate), at(Up)])?,
            down: self.linear(&[at(Down)])?,
        })
    }
}

impl Weights {
    pub(super) fn load(
        gguf: &Gguf,
        spec: &ModelSpec,
        team: &mut Team,
    ) -> Result<Self, BackendError> {
        let mut packer = Packer {
            gguf,
            sources: Vec::new(),
            bytes: 0,
        };
        let embedding = match spec.tied_head {
            true => None,
            false => Some(packer.linear(&[Weight::Embedding])?),
        };
        let layers = (0..spec.n_layer)
            .map(|layer| packer.layer(spec, layer))
            .collect::<Result<Vec<_>, _>>()?;
        let output_norm = packer.vector(Weight::OutputNorm)?;
        let head = packer.linear(&[if spec.tied_head {
            Weight::Embedding
        } else {
            Weight::Head
        }])?;
        let mut arena =
            Arena::new(packer.bytes).map_err(|error| BackendError::Device(Box::new(error)))?;
        packer.pack(team, arena.as_mut_slice())?;
        Ok(Self {
            arena,
            layers,
            output_norm,
            head,
            embedding,
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

    /// The embedding of a token.
    pub(super) fn embed(&self, token: u32, out: &mut [f32]) {
        let linear = self.embedding.as_ref().unwrap_or(&self.head);
        let mut row = token as usize;
        for part in &linear.parts {
            if row < part.layout.n() {
                let data = &self.arena.as_slice()[part.offset..part.offset + part.layout.bytes()];
                return part.layout.unpack_row(data, row, out);
            }
            row -= part.layout.n();
        }
    }
}
