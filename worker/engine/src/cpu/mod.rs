//! The CPU backend: every row on the int8 path, bf16 keys and values, one order of
//! operations for every instruction set, batch and thread count.

mod weights;

use sha2::{Digest, Sha256};
use shoal_core::PAGE_TOKENS;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::attention::MAX_QUERIES;
use shoal_kernels::elementwise::{norm_quantize, quantize, silu_quantize};
use shoal_kernels::gemm::Write;
use shoal_kernels::kv::{HEAD_MULTIPLE, Heads, KvPool, Run};
use shoal_kernels::norm::rms_norm_in_place;
use shoal_kernels::pool::Pool;
use shoal_kernels::quant::{Activations, BLOCK};
use shoal_kernels::rope::{fill_table, rotate_halves, rotate_interleaved};

use crate::backend::{Backend, BackendError, Batch, NumericsId};
use crate::digest::weights_digest;
use crate::spec::{ModelSpec, RopeKind};
use weights::{Linear, Weights};

/// Raised whenever a change of the kernels changes a bit of a result.
const NUMERICS_VERSION: u32 = 1;

/// How a [`CpuBackend`] is built.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// The instruction set; it changes the speed, never a result.
    pub isa: Isa,
    /// Threads that compute.
    pub threads: usize,
    /// Pages of the KV pool.
    pub pages: u32,
    /// Most rows of one step.
    pub max_rows: usize,
    /// Most rows of one step that want logits.
    pub max_logit_rows: usize,
}

/// See the [module](self).
pub struct CpuBackend {
    spec: ModelSpec,
    options: CpuOptions,
    numerics_id: NumericsId,
    pool: Pool,
    weights: Weights,
    kv: KvPool,
    scratch: Scratch,
}

/// The rows of a step between the phases.
struct Scratch {
    residual: Vec<f32>,
    qkv: Vec<f32>,
    attention: Vec<f32>,
    gate_up: Vec<f32>,
    rope: Vec<f32>,
    attn_in: Activations,
    attn_out: Activations,
    ffn_in: Activations,
    ffn_out: Activations,
    head: Activations,
}

impl CpuBackend {
    /// Bytes of one page of the KV pool.
    pub fn page_bytes(spec: &ModelSpec) -> usize {
        KvPool::page_bytes(heads(spec), spec.n_layer)
    }

    /// Packs the weights and allocates the KV pool.
    ///
    /// # Errors
    /// When a tensor is missing, the kernels can't take a width, or memory or threads are
    /// refused.
    pub fn load(gguf: &Gguf, spec: ModelSpec, options: CpuOptions) -> Result<Self, BackendError> {
        check(&spec)?;
        let heads = heads(&spec);
        let q_width = heads.q * heads.dim;
        let device = |error: std::io::Error| BackendError::Device(Box::new(error));
        let mut pool = Pool::new(options.threads).map_err(device)?;
        let weights = Weights::load(gguf, &spec, (&mut pool, options.isa))?;
        let kv = KvPool::new(heads, spec.n_layer, options.pages as usize).map_err(device)?;
        let mut sha = Sha256::new();
        sha.update(weights_digest(gguf, &spec));
        sha.update(b"cpu bf16");
        sha.update(NUMERICS_VERSION.to_le_bytes());
        let rows = options.max_rows;
        let scratch = Scratch {
            residual: vec![0.0; rows * spec.d_model],
            qkv: vec![0.0; rows * heads.qkv()],
            attention: vec![0.0; rows * q_width],
            gate_up: vec![0.0; rows * 2 * spec.d_ff],
            rope: vec![0.0; rows * 2 * spec.rope.inv_freq.len()],
            attn_in: inputs(rows, spec.d_model, weights.each(|layer| &layer.qkv)),
            attn_out: inputs(rows, q_width, weights.each(|layer| &layer.attn_output)),
            ffn_in: inputs(rows, spec.d_model, weights.each(|layer| &layer.gate_up)),
            ffn_out: inputs(rows, spec.d_ff, weights.each(|layer| &layer.down)),
            head: inputs(rows, spec.d_model, std::iter::once(&weights.head)),
        };
        Ok(Self {
            numerics_id: NumericsId(sha.finalize().into()),
            spec,
            options,
            pool,
            weights,
            kv,
            scratch,
        })
    }
}

/// Room for `rows` rows of inputs, in every precision that one of `consumers` takes.
fn inputs<'a>(
    rows: usize,
    width: usize,
    consumers: impl Iterator<Item = &'a Linear>,
) -> Activations {
    Activations::new(rows, width, consumers.flat_map(Linear::precisions))
}

/// Whether the kernels can run a model of this shape.
fn check(spec: &ModelSpec) -> Result<(), BackendError> {
    for (what, width, multiple) in [
        ("the model's width", spec.d_model, BLOCK),
        ("the width of all heads", spec.n_head * spec.head_dim, BLOCK),
        ("the feed-forward width", spec.d_ff, BLOCK),
        ("the width of a head", spec.head_dim, HEAD_MULTIPLE),
    ] {
        if !width.is_multiple_of(multiple) {
            return Err(BackendError::Width {
                what,
                width,
                multiple,
            });
        }
    }
    let group = spec.n_head / spec.n_kv_head;
    if group > MAX_QUERIES {
        return Err(BackendError::QueryGroup {
            group,
            max: MAX_QUERIES,
        });
    }
    Ok(())
}

fn heads(spec: &ModelSpec) -> Heads {
    Heads {
        q: spec.n_head,
        kv: spec.n_kv_head,
        dim: spec.head_dim,
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
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
        let rows = batch.tokens.len();
        let max = self.options.max_rows;
        if rows > max {
            return Err(BackendError::BatchTooLarge { rows, max });
        }
        let runs: Vec<Run<'_>> = batch
            .segments
            .iter()
            .map(|segment| Run {
                row: segment.rows.start as usize,
                rows: segment.rows.len(),
                position: batch.positions[segment.rows.start as usize] as usize,
                pages: &batch.page_table[segment.pages.start as usize..segment.pages.end as usize],
            })
            .collect();
        debug_assert!(
            runs.iter()
                .all(|run| (run.position + run.rows).div_ceil(PAGE_TOKENS) <= run.pages.len())
        );
        self.embed(batch);
        for layer in 0..self.spec.n_layer {
            self.attention(layer, &runs, rows);
            self.feed_forward(layer, rows);
        }
        self.head(batch, logits);
        Ok(())
    }
}

impl CpuBackend {
    fn embed(&mut self, batch: &Batch<'_>) {
        let Scratch { residual, rope, .. } = &mut self.scratch;
        for (x, &token) in residual
            .chunks_exact_mut(self.spec.d_model)
            .zip(batch.tokens)
        {
            self.weights.embed(token, x);
        }
        let spec = &self.spec.rope;
        let width = 2 * spec.inv_freq.len();
        for (table, &position) in rope.chunks_exact_mut(width).zip(batch.positions) {
            fill_table(position, &spec.inv_freq, spec.magnitude, table);
        }
    }

    fn attention(&mut self, index: usize, runs: &[Run<'_>], rows: usize) {
        let (spec, isa, pool) = (&self.spec, self.options.isa, &mut self.pool);
        let layer = &self.weights.layers[index];
        let s = &mut self.scratch;
        let x = &mut s.residual[..rows * spec.d_model];
        norm_quantize(
            pool,
            isa,
            x,
            None,
            &layer.attn_norm,
            spec.rms_eps,
            &mut s.attn_in,
        );
        self.weights.apply(
            &layer.qkv,
            (pool, isa),
            &s.attn_in,
            rows,
            &mut s.qkv,
            Write::Set,
        );

        let heads = heads(spec);
        let scale = 1.0 / (heads.dim as f32).sqrt();
        let (tables, table_width) = (&s.rope, 2 * spec.rope.inv_freq.len());
        self.kv
            .append(pool, index, runs, &mut s.qkv, &|row, head, values| {
                if spec.qkv_bias {
                    let bias = &layer.qkv_bias[head * heads.dim..][..heads.dim];
                    values.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
                }
                if head >= heads.q + heads.kv {
                    return;
                }
                if spec.qk_norm {
                    let weight = if head < heads.q {
                        &layer.q_norm
                    } else {
                        &layer.k_norm
                    };
                    rms_norm_in_place(isa, values, weight, spec.rms_eps);
                }
                let table = &tables[row * table_width..][..table_width];
                match spec.rope.kind {
                    RopeKind::Interleaved => rotate_interleaved(values, table),
                    RopeKind::Halves => rotate_halves(values, table),
                }
                if head < heads.q {
                    values.iter_mut().for_each(|v| *v *= scale);
                }
            });
        let out = &mut s.attention[..rows * heads.q * heads.dim];
        self.kv.attend(pool, isa, index, runs, &s.qkv, out);
        quantize(pool, isa, out, &mut s.attn_out);
        self.weights.apply(
            &layer.attn_output,
            (pool, isa),
            &s.attn_out,
            rows,
            x,
            Write::Add,
        );
    }

    fn feed_forward(&mut self, index: usize, rows: usize) {
        let (spec, isa, pool) = (&self.spec, self.options.isa, &mut self.pool);
        let layer = &self.weights.layers[index];
        let s = &mut self.scratch;
        let x = &mut s.residual[..rows * spec.d_model];
        norm_quantize(
            pool,
            isa,
            x,
            None,
            &layer.ffn_norm,
            spec.rms_eps,
            &mut s.ffn_in,
        );
        self.weights.apply(
            &layer.gate_up,
            (pool, isa),
            &s.ffn_in,
            rows,
            &mut s.gate_up,
            Write::Set,
        );
        silu_quantize(
            pool,
            isa,
            &s.gate_up[..rows * 2 * spec.d_ff],
            &mut s.ffn_out,
        );
        self.weights
            .apply(&layer.down, (pool, isa), &s.ffn_out, rows, x, Write::Add);
    }

    fn head(&mut self, batch: &Batch<'_>, logits: &mut [f32]) {
        let (isa, pool) = (self.options.isa, &mut self.pool);
        let s = &mut self.scratch;
        let (weight, eps) = (&self.weights.output_norm, self.spec.rms_eps);
        let picked = batch.logit_rows;
        norm_quantize(
            pool,
            isa,
            &s.residual,
            Some(picked),
            weight,
            eps,
            &mut s.head,
        );
        self.weights.apply(
            &self.weights.head,
            (pool, isa),
            &s.head,
            picked.len(),
            logits,
            Write::Set,
        );
    }
}
