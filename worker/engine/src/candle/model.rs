//! The transformer, in candle's operations.

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use candle_nn::rotary_emb::{rope, rope_i};
use shoal_gguf::{GgmlType, Gguf};

use super::plan::{SegmentPlan, StepPlan};
use super::{CandleOptions, CandleWeights, device_error, kv_slots};
use crate::backend::BackendError;
use crate::spec::{ModelSpec, RopeKind};
use crate::weights::{LayerWeight, Weight};

type LoadResult<T> = std::result::Result<T, BackendError>;

/// Weights and KV pool.
pub(super) struct Model {
    embedding: QMatMul,
    layers: Vec<Layer>,
    output_norm: Tensor,
    head: QMatMul,
    shape: Shape,
}

/// What the arithmetic needs of the spec.
#[derive(Clone, Copy)]
struct Shape {
    n_head: usize,
    n_kv_head: usize,
    head_dim: usize,
    eps: f32,
    rope: RopeKind,
}

struct Layer {
    attn_norm: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    attn_output: QMatMul,
    ffn_norm: Tensor,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
    kv: KvPool,
}

/// A linear map into heads.
struct Projection {
    weight: QMatMul,
    bias: Option<Tensor>,
    norm: Option<Tensor>,
}

/// One layer's keys and values, each `[slots, n_kv_head * head_dim]`; slot s is offset
/// `s % PAGE_TOKENS` of page `s / PAGE_TOKENS`.
struct KvPool {
    keys: Tensor,
    values: Tensor,
}

impl Model {
    pub(super) fn load(gguf: &Gguf, spec: &ModelSpec, options: &CandleOptions) -> LoadResult<Self> {
        let loader = Loader {
            gguf,
            spec,
            options,
        };
        let embedding = loader.matrix(Weight::Embedding)?;
        let head = if spec.tied_head {
            embedding.clone()
        } else {
            loader.matrix(Weight::Head)?
        };
        Ok(Self {
            embedding,
            layers: (0..spec.n_layer)
                .map(|i| loader.layer(i))
                .collect::<LoadResult<_>>()?,
            output_norm: loader.vector(Weight::OutputNorm)?,
            head,
            shape: Shape {
                n_head: spec.n_head,
                n_kv_head: spec.n_kv_head,
                head_dim: spec.head_dim,
                eps: spec.rms_eps,
                rope: spec.rope.kind,
            },
        })
    }

    /// Stores the keys and values of every row; gives the logits `[wanted, vocab]`.
    pub(super) fn forward(&self, plan: &StepPlan) -> Result<Option<Tensor>> {
        let mut x = self.embedding.embedding(&plan.tokens)?;
        for layer in &self.layers {
            x = (&x + layer.attention(&x, plan, self.shape)?)?;
            x = (&x + layer.feed_forward(&x, self.shape)?)?;
        }
        let Some(wanted) = &plan.logit_rows else {
            return Ok(None);
        };
        let x = x.index_select(wanted, 0)?;
        let x = rms_norm(&x, &self.output_norm, self.shape.eps)?;
        self.head.forward(&x).map(Some)
    }
}

impl Layer {
    fn attention(&self, x: &Tensor, plan: &StepPlan, shape: Shape) -> Result<Tensor> {
        let x = rms_norm(x, &self.attn_norm, shape.eps)?;
        let q = shape.rotate(&self.q.heads(&x, shape.n_head, shape)?, plan)?;
        let k = shape.rotate(&self.k.heads(&x, shape.n_kv_head, shape)?, plan)?;
        let v = self.v.heads(&x, shape.n_kv_head, shape)?;
        self.kv.append(&k, &v, &plan.slots)?;
        let attended = plan
            .segments
            .iter()
            .map(|segment| self.kv.attend(&q, segment, shape))
            .collect::<Result<Vec<_>>>()?;
        self.attn_output.forward(&Tensor::cat(&attended, 0)?)
    }

    fn feed_forward(&self, x: &Tensor, shape: Shape) -> Result<Tensor> {
        let x = rms_norm(x, &self.ffn_norm, shape.eps)?;
        let gated = (self.gate.forward(&x)?.silu()? * self.up.forward(&x)?)?;
        self.down.forward(&gated)
    }
}

impl Projection {
    /// `[rows, d_model]` to `[heads, rows, head_dim]`.
    fn heads(&self, x: &Tensor, heads: usize, shape: Shape) -> Result<Tensor> {
        let mut y = self.weight.forward(x)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let mut y = y.reshape((x.dim(0)?, heads, shape.head_dim))?;
        if let Some(norm) = &self.norm {
            y = rms_norm(&y, norm, shape.eps)?;
        }
        y.transpose(0, 1)?.contiguous()
    }
}

impl Shape {
    /// Rotates `[heads, rows, head_dim]` by the positions of the rows.
    fn rotate(self, x: &Tensor, plan: &StepPlan) -> Result<Tensor> {
        let turn = match self.rope {
            RopeKind::Interleaved => rope_i,
            RopeKind::Halves => rope,
        };
        let dims = 2 * plan.cos.dim(D::Minus1)?;
        let x = x.unsqueeze(0)?;
        let turned = if dims == self.head_dim {
            turn(&x, &plan.cos, &plan.sin)?
        } else {
            let rest = x.narrow(D::Minus1, dims, self.head_dim - dims)?;
            let first = x.narrow(D::Minus1, 0, dims)?.contiguous()?;
            Tensor::cat(&[&turn(&first, &plan.cos, &plan.sin)?, &rest], D::Minus1)?
        };
        turned.squeeze(0)
    }
}

impl KvPool {
    fn new(slots: usize, width: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            keys: Tensor::zeros((slots, width), DType::F32, device)?,
            values: Tensor::zeros((slots, width), DType::F32, device)?,
        })
    }

    /// Stores `[n_kv_head, rows, head_dim]` at the rows' slots.
    fn append(&self, keys: &Tensor, values: &Tensor, slots: &Tensor) -> Result<()> {
        let flat = |x: &Tensor| x.transpose(0, 1)?.contiguous()?.flatten_from(1);
        self.keys.scatter_set(slots, &flat(keys)?, 0)?;
        self.values.scatter_set(slots, &flat(values)?, 0)
    }

    /// Causal attention of one segment's rows: from queries `[n_head, rows of the batch,
    /// head_dim]` to `[rows, n_head * head_dim]`.
    fn attend(&self, q: &Tensor, segment: &SegmentPlan, shape: Shape) -> Result<Tensor> {
        let Shape {
            n_head,
            n_kv_head,
            head_dim,
            ..
        } = shape;
        let rows = segment.rows;
        // The query heads of one key head stand together, as if they were more rows of it.
        let grouped = (n_kv_head, n_head / n_kv_head * rows, head_dim);
        let q = q
            .narrow(1, segment.start, rows)?
            .contiguous()?
            .reshape(grouped)?;
        let q = (q / (head_dim as f64).sqrt())?;
        let gather = |pool: &Tensor| {
            pool.index_select(&segment.span, 0)?
                .reshape(((), n_kv_head, head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let (keys, values) = (gather(&self.keys)?, gather(&self.values)?);
        let mut scores = q.matmul(&keys.t()?)?;
        if let Some(mask) = &segment.mask {
            let per_head = scores.reshape((n_head, rows, ()))?.broadcast_add(mask)?;
            scores = per_head.reshape(scores.shape())?;
        }
        softmax_last_dim(&scores)?
            .matmul(&values)?
            .reshape((n_head, rows, head_dim))?
            .transpose(0, 1)?
            .contiguous()?
            .flatten_from(1)
    }
}

struct Loader<'a> {
    gguf: &'a Gguf,
    spec: &'a ModelSpec,
    options: &'a CandleOptions,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> LoadResult<Layer> {
        let of = |weight| Weight::Layer(layer, weight);
        let matrix = |weight| self.matrix(of(weight));
        let vector = |weight| self.vector(of(weight));
        let optional = |there: bool, weight| there.then(|| vector(weight)).transpose();
        let (bias, norm) = (self.spec.qkv_bias, self.spec.qk_norm);
        let slots = kv_slots(self.options.pages);
        let width = self.spec.n_kv_head * self.spec.head_dim;
        Ok(Layer {
            attn_norm: vector(LayerWeight::AttnNorm)?,
            q: Projection {
                weight: matrix(LayerWeight::Q)?,
                bias: optional(bias, LayerWeight::QBias)?,
                norm: optional(norm, LayerWeight::QNorm)?,
            },
            k: Projection {
                weight: matrix(LayerWeight::K)?,
                bias: optional(bias, LayerWeight::KBias)?,
                norm: optional(norm, LayerWeight::KNorm)?,
            },
            v: Projection {
                weight: matrix(LayerWeight::V)?,
                bias: optional(bias, LayerWeight::VBias)?,
                norm: None,
            },
            attn_output: matrix(LayerWeight::AttnOutput)?,
            ffn_norm: vector(LayerWeight::FfnNorm)?,
            gate: matrix(LayerWeight::Gate)?,
            up: matrix(LayerWeight::Up)?,
            down: matrix(LayerWeight::Down)?,
            kv: KvPool::new(slots, width, &self.options.device).map_err(device_error)?,
        })
    }

    fn matrix(&self, weight: Weight) -> LoadResult<QMatMul> {
        let tensor = self.tensor(weight)?;
        match self.options.weights {
            CandleWeights::Quantized => QMatMul::from_qtensor(tensor),
            CandleWeights::F32 => tensor.dequantize(&self.options.device).map(QMatMul::Tensor),
        }
        .map_err(device_error)
    }

    fn vector(&self, weight: Weight) -> LoadResult<Tensor> {
        self.tensor(weight)?
            .dequantize(&self.options.device)
            .map_err(device_error)
    }

    fn tensor(&self, weight: Weight) -> LoadResult<QTensor> {
        let error = |reason: String| BackendError::Weights {
            tensor: weight.to_string(),
            reason,
        };
        let view = self
            .gguf
            .tensor(&weight.to_string())
            .ok_or_else(|| error("is missing".to_owned()))?;
        // candle casts the bytes to blocks where they are, which have numbers of 4 bytes at most.
        if !view.data.as_ptr().addr().is_multiple_of(align_of::<f32>()) {
            return Err(error("does not start on 4 bytes".to_owned()));
        }
        QStorage::from_data(view.data.into(), &self.options.device, candle_type(view.ty))
            .and_then(|storage| QTensor::new(storage, view.shape))
            .map_err(|e| error(e.to_string()))
    }
}

fn candle_type(ty: GgmlType) -> GgmlDType {
    match ty {
        GgmlType::F32 => GgmlDType::F32,
        GgmlType::F16 => GgmlDType::F16,
        GgmlType::BF16 => GgmlDType::BF16,
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
    }
}
