//! The CPU backend: rows of output on the int8 path, those of prompts on it or the bf16 path, keys
//! and values in int16, bf16 or int8, one order of operations for every instruction set, batch and
//! thread count.
//!
//! The ranks of a tensor-parallel group are backends of a [shard](ShardPlan) each. Rank 0 is the
//! one that an engine has: its step sends the batch to the others, who [follow](CpuBackend::follow).

mod forward;
mod pack;
mod phases;
mod shard;
mod wanted;
mod weights;
mod words;

pub use phases::{Phase, PhaseTimes};

use sha2::{Digest, Sha256};
use shoal_collective::Collective;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::attention::MAX_QUERIES;
use shoal_kernels::kv::{HEAD_MULTIPLE, Heads, KvPool, KvType, Plan};
use shoal_kernels::lines::Lines;
use shoal_kernels::logits;
use shoal_kernels::quant::{Activations, BLOCK, SumOrder};
use shoal_kernels::team::Team;

use crate::backend::{Backend, BackendError, Batch, NumericsId, Segment};
use crate::digest::weights_digest;
use crate::spec::ModelSpec;
use forward::Group;
pub use shard::{Estimate, Shard, ShardError, ShardPlan};
use weights::{Layer, Linear, Weights};

/// Raised whenever a change of the kernels changes a bit of a result.
const NUMERICS_VERSION: u32 = 4;

/// How the activations of a prompt are kept where the weights are quantised, from the norm
/// before the first layer to the logits of its last token. Those of an output are int8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptPrecision {
    /// As those of an output: the fastest on machines without AMX.
    Int8,
    /// bf16, 20 times closer to f32, summed in the order of AVX-512 BF16.
    Bf16,
    /// bf16, summed in the order of AMX.
    Bf16Tiles,
}

impl PromptPrecision {
    /// The fastest with `isa`.
    pub fn best(isa: Isa) -> Self {
        if isa == Isa::detect() && shoal_kernels::amx::available() {
            Self::Bf16Tiles
        } else {
            Self::Int8
        }
    }

    /// Every one.
    pub const ALL: [Self; 3] = [Self::Int8, Self::Bf16, Self::Bf16Tiles];

    /// Its name: `int8`, `bf16` or `bf16-tiles`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::Bf16Tiles => "bf16-tiles",
        }
    }
}

/// How a [`CpuBackend`] is built.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// The instruction set; it changes the speed, never a result.
    pub isa: Isa,
    /// How prompts are computed: part of the numerics.
    pub prompts: PromptPrecision,
    /// Threads that compute.
    pub threads: usize,
    /// What keys and values are kept as; it changes results.
    pub kv: KvType,
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
    shards: ShardPlan,
    shard: Shard,
    heads: Heads,
    group: Group,
    /// The plan of a step, for the other ranks or from rank 0.
    words: Vec<u32>,
    segments: Vec<Segment>,
    team: Team,
    weights: Weights,
    kv: KvPool,
    plan: Plan,
    scratch: Scratch,
    times: PhaseTimes,
}

/// The rows of a step between the phases.
struct Scratch {
    residual: Lines,
    /// Ready to attend with.
    queries: Vec<u32>,
    rope: Vec<f32>,
    attn_in: Activations,
    attn_out: Activations,
    ffn_in: Activations,
    ffn_out: Activations,
    head: Activations,
    /// Of the blocks of every row of logits.
    maxima: Vec<f32>,
}

impl Scratch {
    /// Says which rows are those of prompts.
    fn set_prompts(&mut self, batch: &Batch<'_>) -> Result<(), BackendError> {
        let outputs = batch.outputs().ok_or(BackendError::Order)?;
        for inputs in [
            &mut self.attn_in,
            &mut self.attn_out,
            &mut self.ffn_in,
            &mut self.ffn_out,
        ] {
            inputs.set_prompts(outputs);
        }
        let picked = batch
            .logit_rows
            .partition_point(|&row| (row as usize) < outputs);
        self.head.set_prompts(picked);
        Ok(())
    }
}

impl CpuBackend {
    /// Bytes of one page of the KV pool, of all ranks together where no head is shared.
    pub fn page_bytes(spec: &ModelSpec, kv: KvType) -> usize {
        let heads = Heads::new(spec.n_head, spec.n_kv_head, spec.head_dim);
        KvPool::page_bytes(kv, heads, spec.n_layer)
    }

    /// Packs the weights and allocates the KV pool, as the only rank.
    ///
    /// # Errors
    /// When a tensor is missing, the kernels can't take a width, or memory or threads are
    /// refused.
    ///
    /// # Panics
    /// When the machine lacks the instruction set.
    pub fn load(gguf: &Gguf, spec: ModelSpec, options: CpuOptions) -> Result<Self, BackendError> {
        let shards = ShardPlan::new(&spec, 1)?;
        Self::load_rank(gguf, spec, options, shards, 0)
    }

    /// The same for what a rank of several has. It runs no step before it has
    /// [joined](Self::join) a group.
    ///
    /// # Errors
    /// As `load`.
    ///
    /// # Panics
    /// When there is no such rank, or the machine lacks the instruction set.
    pub fn load_rank(
        gguf: &Gguf,
        spec: ModelSpec,
        options: CpuOptions,
        shards: ShardPlan,
        rank: usize,
    ) -> Result<Self, BackendError> {
        check(&spec)?;
        let shard = shards.shards()[rank].clone();
        let all = Heads::new(spec.n_head, spec.n_kv_head, spec.head_dim);
        let heads = all.part(shard.q.clone());
        let q_width = heads.q * heads.dim;
        let device = |error: std::io::Error| BackendError::Device(Box::new(error));
        let mut team =
            Team::new(options.threads, options.isa, spec.d_model, heads.dim).map_err(device)?;
        let weights = Weights::load(gguf, &spec, &shard, &mut team)?;
        let pages = options.pages as usize;
        let kv = KvPool::new(options.kv, heads, spec.n_layer, pages).map_err(device)?;
        let mut sha = Sha256::new();
        sha.update(weights_digest(gguf, &spec));
        sha.update(b"cpu ");
        sha.update(options.kv.name());
        sha.update(NUMERICS_VERSION.to_le_bytes());
        sha.update(options.prompts.name());
        if shards.world() > 1 {
            shards.hash(&mut sha);
        }
        let rows = options.max_rows;
        let inputs = |width, consumers: &mut dyn Iterator<Item = &Linear>| {
            let inputs = Activations::new(rows, width, consumers.flat_map(Linear::precisions));
            match options.prompts {
                PromptPrecision::Int8 => inputs,
                PromptPrecision::Bf16 => inputs.with_prompts(SumOrder::Pairs),
                PromptPrecision::Bf16Tiles => inputs.with_prompts(SumOrder::Tiles),
            }
        };
        let scratch = Scratch {
            residual: Lines::new(rows * spec.d_model),
            queries: vec![0; rows * heads.query_words()],
            rope: vec![0.0; rows * 2 * spec.rope.inv_freq.len()],
            attn_in: inputs(spec.d_model, &mut weights.each(|layer| &layer.qkv)),
            attn_out: inputs(q_width, &mut weights.each(|layer| &layer.attn_output)),
            ffn_in: inputs(spec.d_model, &mut weights.each(|layer| &layer.gate_up)),
            ffn_out: inputs(shard.ff.len(), &mut weights.each(|layer| &layer.down)),
            head: inputs(spec.d_model, &mut std::iter::once(&weights.head)),
            maxima: vec![0.0; options.max_logit_rows * spec.vocab.div_ceil(logits::BLOCK)],
        };
        Ok(Self {
            numerics_id: NumericsId(sha.finalize().into()),
            plan: Plan::new(heads, team.threads(), rows),
            shards,
            shard,
            heads,
            group: None,
            words: Vec::new(),
            segments: Vec::new(),
            spec,
            options,
            team,
            weights,
            kv,
            scratch,
            times: PhaseTimes::start(),
        })
    }

    /// Where the time of the last step went.
    pub fn times(&self) -> PhaseTimes {
        self.times
    }

    /// Bytes of packed weights that a phase of a step reads.
    pub fn weight_bytes(&self, phase: Phase) -> usize {
        let weights = &self.weights;
        let layers = |of: fn(&Layer) -> &Linear| weights.each(of).map(Linear::bytes).sum();
        match phase {
            Phase::Begin | Phase::Norm | Phase::Attention => 0,
            Phase::Qkv => layers(|layer| &layer.qkv),
            Phase::Output => layers(|layer| &layer.attn_output),
            Phase::GateUp => layers(|layer| &layer.gate_up),
            Phase::Down => layers(|layer| &layer.down),
            Phase::Head => weights.head.bytes(),
        }
    }

    /// Its number among the ranks.
    pub fn rank(&self) -> usize {
        self.shard.rank
    }

    /// Words of the largest frame of a group of such ranks.
    pub fn frame_words(&self) -> usize {
        let CpuOptions {
            max_rows,
            max_logit_rows,
            ..
        } = self.options;
        let shards = self.shards.shards().iter();
        let logits = shards.map(|shard| shard.vocab.len() + shard.vocab_blocks().len());
        (max_rows * self.spec.d_model)
            .max(max_logit_rows * logits.max().unwrap_or(0))
            .max(words::most(max_rows, max_logit_rows, self.spec.context))
    }

    /// Empties the KV pool, and gives it so many pages.
    ///
    /// # Errors
    /// When the memory is refused.
    pub fn set_pages(&mut self, pages: u32) -> Result<(), BackendError> {
        let kv = KvPool::new(
            self.options.kv,
            self.heads,
            self.spec.n_layer,
            pages as usize,
        );
        self.kv = kv.map_err(|error| BackendError::Device(Box::new(error)))?;
        self.options.pages = pages;
        Ok(())
    }

    /// Takes its seat in a group, in place of an earlier one. What the KV pool holds is void.
    ///
    /// # Errors
    /// When the seat is not this rank's, or the group of another size.
    pub fn join(&mut self, seat: Box<dyn Collective>) -> Result<(), BackendError> {
        let (rank, world) = (self.shard.rank, self.shards.world());
        if (seat.rank(), seat.world()) != (rank, world) {
            return Err(BackendError::Seat {
                rank,
                world,
                seat: seat.rank(),
                seats: seat.world(),
            });
        }
        self.group = Some(seat);
        Ok(())
    }

    /// Leaves its group: the other ranks see it as lost.
    pub fn leave(&mut self) {
        self.group = None;
    }

    /// Waits for a step of rank 0's and does this rank's share of it.
    ///
    /// # Errors
    /// When a rank is lost, or the step is not one for this model.
    pub fn follow(&mut self) -> Result<(), BackendError> {
        let group = self.group.as_mut().ok_or(BackendError::NoGroup)?;
        group.broadcast(&mut self.words)?;
        let words = std::mem::take(&mut self.words);
        let mut segments = std::mem::take(&mut self.segments);
        let result = match words::decode(&words, &mut segments, self.options.pages) {
            Some(batch) => self.fits(&batch).and_then(|()| self.run(&batch, &mut [])),
            None => Err(BackendError::Plan),
        };
        (self.words, self.segments) = (words, segments);
        result
    }

    /// The residual stream of the last step's rows whose logits were wanted: every rank has the same.
    pub fn residual(&self) -> &[f32] {
        &self.scratch.residual[..self.plan.rows() * self.spec.d_model]
    }

    fn fits(&self, batch: &Batch<'_>) -> Result<(), BackendError> {
        batch.fits(self.options.max_rows, self.options.max_logit_rows)
    }

    fn run(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        self.times = PhaseTimes::start();
        self.plan.set(wanted::all(batch));
        self.scratch.set_prompts(batch)?;
        Ok(self.forward(batch, logits)?)
    }
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

    fn ranks(&self) -> usize {
        self.shards.world()
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        self.fits(batch)?;
        if self.shards.world() > 1 {
            let group = self.group.as_mut().ok_or(BackendError::NoGroup)?;
            words::encode(batch, &mut self.words);
            group.broadcast(&mut self.words)?;
        }
        self.run(batch, logits)
    }

    fn maxima(&self) -> &[f32] {
        &self.scratch.maxima
    }
}
