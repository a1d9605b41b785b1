//! The CPU backend: every row on the int8 path, bf16 keys and values, one order of
//! operations for every instruction set, batch and thread count.

mod weights;

use sha2::{Digest, Sha256};
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::attention::MAX_QUERIES;
use shoal_kernels::elementwise::norm_quantize;
use shoal_kernels::gemm::{Write, gated, multiply};
use shoal_kernels::kv::{HEAD_MULTIPLE, Heads, KvPool, Plan, Run};
use shoal_kernels::norm::rms_norm_in_place;
use shoal_kernels::quant::{Activations, BLOCK};
use shoal_kernels::rope::{fill_table, rotate_halves, rotate_interleaved};
use shoal_kernels::team::Team;

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
    team: Team,
    weights: Weights,
    kv: KvPool,
    plan: Plan,
    scratch: Scratch,
}

/// The rows of a step between the phases.
struct Scratch {
    residual: Vec<f32>,
    queries: Vec<f32>,
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
        let mut team =
            Team::new(options.threads, options.isa, spec.d_model, heads.dim).map_err(device)?;
        let weights = Weights::load(gguf, &spec, &mut team)?;
        let kv = KvPool::new(heads, spec.n_layer, options.pages as usize).map_err(device)?;
        let mut sha = Sha256::new();
        sha.update(weights_digest(gguf, &spec));
        sha.update(b"cpu bf16");
        sha.update(NUMERICS_VERSION.to_le_bytes());
        let rows = options.max_rows;
        let scratch = Scratch {
            residual: vec![0.0; rows * spec.d_model],
            queries: vec![0.0; rows * q_width],
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
            plan: Plan::new(heads, team.threads(), rows),
            team,
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
        for (rows, max) in [
            (rows, self.options.max_rows),
            (batch.logit_rows.len(), self.options.max_logit_rows),
        ] {
            if rows > max {
                return Err(BackendError::BatchTooLarge { rows, max });
            }
        }
        self.plan.set(batch.segments.iter().map(|segment| Run {
            row: segment.rows.start as usize,
            rows: segment.rows.len(),
            position: batch.positions[segment.rows.start as usize] as usize,
            pages: &batch.page_table[segment.pages.start as usize..segment.pages.end as usize],
        }));
        self.embed(batch);
        for layer in 0..self.spec.n_layer {
            self.attention(layer);
            self.feed_forward(layer);
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

    fn attention(&mut self, index: usize) {
        let (spec, isa, team) = (&self.spec, self.options.isa, &mut self.team);
        let (layer, rows) = (&self.weights.layers[index], self.plan.rows());
        let s = &mut self.scratch;
        let x = &mut s.residual[..rows * spec.d_model];
        norm_quantize(
            team,
            x,
            None,
            &layer.attn_norm,
            spec.rms_eps,
            &mut s.attn_in,
        );

        let heads = heads(spec);
        let scale = 1.0 / (heads.dim as f32).sqrt();
        let (tables, table_width) = (&s.rope, 2 * spec.rope.inv_freq.len());
        let inputs = (self.weights.linear(&layer.qkv), &s.attn_in);
        self.kv.project(
            team,
            index,
            &self.plan,
            inputs,
            &mut s.queries,
            &|row, head, values| {
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
            },
        );
        self.kv
            .attend(team, index, &mut self.plan, &s.queries, &mut s.attn_out);
        let output = self.weights.linear(&layer.attn_output);
        multiply(team, output, &s.attn_out, rows, x, Write::Add);
    }

    fn feed_forward(&mut self, index: usize) {
        let (spec, team) = (&self.spec, &mut self.team);
        let (layer, rows) = (&self.weights.layers[index], self.plan.rows());
        let s = &mut self.scratch;
        let x = &mut s.residual[..rows * spec.d_model];
        norm_quantize(team, x, None, &layer.ffn_norm, spec.rms_eps, &mut s.ffn_in);
        let gate_up = self.weights.linear(&layer.gate_up);
        gated(team, gate_up, &s.ffn_in, rows, &mut s.ffn_out);
        let down = self.weights.linear(&layer.down);
        multiply(team, down, &s.ffn_out, rows, x, Write::Add);
    }

    fn head(&mut self, batch: &Batch<'_>, logits: &mut [f32]) {
        let (spec, team, s) = (&self.spec, &mut self.team, &mut self.scratch);
        let (weight, picked) = (&self.weights.output_norm, batch.logit_rows);
        norm_quantize(
            team,
            &s.residual,
            Some(picked),
            weight,
            spec.rms_eps,
            &mut s.head,
        );
        let head = self.weights.linear(&self.weights.head);
        multiply(team, head, &s.head, picked.len(), logits, Write::Set);
    }
}
