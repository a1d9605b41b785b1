//! Steps, timed.

use std::hint::black_box;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use shoal_core::{PAGE_TOKENS, Role, Sampling};
use shoal_engine::backend::Backend;
use shoal_engine::config::EngineConfig;
use shoal_engine::cpu::{CpuBackend, CpuOptions, Phase, PromptPrecision};
use shoal_engine::sampler::{Counts, Draw, Sampler};
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::arena::Arena;
use shoal_kernels::kv::KvType;
use shoal_kernels::limits::{dot_rate, fma_rate, phase_cost, read_rate};
use shoal_kernels::lines::Lines;
use shoal_kernels::logits::BLOCK;
use shoal_kernels::pool::Pool;
use shoal_worker::CoreTime;

use super::case::{Case, Group, Layout, all};
use super::report::{Limits, Measured, Part, Report, Work};
use super::{EngineArgs, EngineBenchError};

/// Most rows that want logits.
const LOGIT_ROWS: usize = 64;
/// Repeats of a case at least, however long they take.
const LEAST_REPEATS: usize = 5;
/// Memory that the read rate is measured on.
const READ_BYTES: usize = 96 << 20;

/// Measures every case that `args` asks for on the model at `path`.
pub(crate) fn run(args: &EngineArgs, path: &Path) -> Result<Report, EngineBenchError> {
    let isa = args.isa.unwrap_or_else(Isa::detect);
    if !isa.is_available() {
        return Err(EngineBenchError::Isa(isa));
    }
    let threads = args.threads.or_else(|| available_parallelism().ok());
    let threads = threads.map_or(1, Into::into);
    let gguf = Gguf::open(path)?;
    let spec = ModelSpec::from_gguf(&gguf)?;
    let sampling = Sampling {
        temperature: args.temperature,
        ..Sampling::default()
    };
    sampling.validate(u32::try_from(spec.vocab).unwrap_or(u32::MAX))?;
    let chunk = EngineConfig::default().prefill_chunk;
    let kv = args.kv_type.unwrap_or_default();
    let mut cases = all(spec.context, chunk);
    cases.retain(|case| case.name.contains(&args.only));
    let layouts: Vec<Vec<Layout>> = cases
        .iter()
        .map(|case| {
            let steps = case.steps.iter();
            steps.map(|step| Layout::new(step, spec.vocab)).collect()
        })
        .collect();
    let steps = || layouts.iter().flatten();
    let Some(pages) = steps().map(Layout::pages).max() else {
        return Err(EngineBenchError::NoCase(args.only.clone()));
    };
    let options = CpuOptions {
        isa,
        prompts: args.prompt_precision.unwrap_or(PromptPrecision::best(isa)),
        threads,
        kv,
        pages,
        max_rows: steps().map(Layout::rows).max().unwrap_or(1).max(LOGIT_ROWS),
        max_logit_rows: LOGIT_ROWS,
    };
    let started = Instant::now();
    let backend = CpuBackend::load(&gguf, spec, options)?;
    let load = started.elapsed();
    let mut probe = Probe::new(threads, isa)?;
    let mut bench = Bench::new(backend, kv, sampling);
    bench.touch()?;
    let mut measured = Vec::new();
    let mut before = probe.limits();
    for (case, layouts) in cases.iter().zip(&layouts) {
        let steps = bench.measure(case, layouts, args.time)?;
        let after = probe.limits();
        measured.push((steps, before.mean(&after)));
        before = after;
    }
    Ok(Report::new(isa, threads, load, measured))
}

/// Finds the limits of the machine. A virtual one changes them: its cores are moved, or share
/// memory with others.
struct Probe {
    pool: Pool,
    arena: Arena,
    isa: Isa,
}

impl Probe {
    fn new(threads: usize, isa: Isa) -> Result<Self, EngineBenchError> {
        let (pool, mut arena) = (Pool::new(threads)?, Arena::new(READ_BYTES)?);
        arena.as_mut_slice().fill(1);
        Ok(Self { pool, arena, isa })
    }

    fn limits(&mut self) -> Limits {
        let Self { pool, arena, isa } = self;
        Limits {
            read: read_rate(pool, arena.as_slice()),
            dots: dot_rate(pool, *isa),
            fmas: fma_rate(pool, *isa),
            phase: phase_cost(pool),
        }
    }
}

/// Nothing but the steps runs in this process.
const ALL_THREADS: &[&str] = &[""];

/// The parts of a step: the backend's phases, then drawing.
const PARTS: usize = Phase::ALL.len() + 1;

/// A backend and the memory of a step.
struct Bench {
    backend: CpuBackend,
    kv: KvType,
    logits: Lines,
    sampler: Sampler,
    counts: Counts,
    sampling: Sampling,
}

impl Bench {
    fn new(backend: CpuBackend, kv: KvType, sampling: Sampling) -> Self {
        Self {
            kv,
            logits: Lines::new(LOGIT_ROWS * backend.spec().vocab),
            backend,
            sampler: Sampler::default(),
            counts: Counts::default(),
            sampling,
        }
    }

    /// Runs a step and draws from its logits: the time of every part.
    fn step(&mut self, layout: &Layout) -> Result<[Duration; PARTS], EngineBenchError> {
        let vocab = self.backend.spec().vocab;
        let logits = &mut self.logits[..layout.logits() * vocab];
        self.backend.step(&layout.batch(), logits)?;
        let started = Instant::now();
        let maxima = self.backend.maxima().chunks_exact(vocab.div_ceil(BLOCK));
        for (logits, maxima) in logits.chunks_exact_mut(vocab).zip(maxima) {
            let draw = Draw {
                sampling: &self.sampling,
                counts: &self.counts,
                masked: &[],
                position: 0,
            };
            // A file of noise may give what can't be drawn from; it takes as long.
            let _ = black_box(self.sampler.draw(logits, maxima, draw));
        }
        let drawn = started.elapsed();
        let times = self.backend.times();
        let of = |part: usize| Phase::ALL.get(part).map_or(drawn, |&p| times.of(p));
        Ok(std::array::from_fn(of))
    }

    /// Writes a token to every page: memory that never was written is one page of zeros, which
    /// no cache has to fetch.
    fn touch(&mut self) -> Result<(), EngineBenchError> {
        let vocab = self.backend.spec().vocab;
        for first in (0..self.backend.pages()).step_by(LOGIT_ROWS) {
            let group = Group {
                sequences: LOGIT_ROWS.min((self.backend.pages() - first) as usize),
                position: 0,
                rows: 1,
                role: Role::Output,
                shared: 0,
            };
            self.step(&Layout::new(&[group], vocab).moved_to(first))?;
        }
        Ok(())
    }

    fn measure(
        &mut self,
        case: &Case,
        layouts: &[Layout],
        time: Duration,
    ) -> Result<Measured, EngineBenchError> {
        let mut repeats: Vec<[f64; PARTS]> = Vec::new();
        let cores = CoreTime::of_threads(ALL_THREADS);
        let started = Instant::now();
        while repeats.len() < LEAST_REPEATS || started.elapsed() < time {
            let mut sums = [0.0; PARTS];
            for layout in layouts {
                for (sum, time) in sums.iter_mut().zip(self.step(layout)?) {
                    *sum += time.as_secs_f64();
                }
            }
            repeats.push(sums);
        }
        let cores = CoreTime::of_threads(ALL_THREADS) - cores;
        let parts = (0..PARTS).map(|part| {
            let phase = Phase::ALL.get(part).copied();
            Part {
                name: phase.map_or("draw", Phase::name),
                seconds: median(repeats.iter().map(|times| times[part])),
                work: phase.map_or(Work::default(), |phase| self.work(phase, case, layouts)),
            }
        });
        let totals = || repeats.iter().map(|times| times.iter().sum::<f64>());
        Ok(Measured {
            name: case.name.clone(),
            rows: layouts.iter().map(Layout::rows).sum(),
            seconds: median(totals()),
            least: totals().fold(f64::INFINITY, f64::min),
            waited: cores.waited_share(),
            parts: parts.collect(),
        })
    }

    /// What a phase must do at least.
    fn work(&self, phase: Phase, case: &Case, layouts: &[Layout]) -> Work {
        let spec = self.backend.spec();
        let groups = || case.steps.iter().flatten();
        if phase == Phase::Attention {
            let token = CpuBackend::page_bytes(spec, self.kv) / PAGE_TOKENS;
            // The last layer attends with the rows that want logits alone.
            let attended =
                |group: &Group| (spec.n_layer - 1) * group.attended() + group.attended_by_wanted();
            let attended: usize = groups().map(attended).sum();
            // An instruction for pairs of int16, which int8 become, does two of these.
            let at_once = match self.kv {
                KvType::Bf16 => 1,
                KvType::Int16 | KvType::Int8 => 2,
            };
            return Work {
                bytes: groups().map(Group::tokens).sum::<usize>() * token,
                dots: 0,
                // A query head reads a token's key and its value.
                fmas: 4 * attended * spec.n_head * spec.head_dim / at_once,
            };
        }
        let rows: usize = layouts.iter().map(Layout::rows).sum();
        let logits: usize = layouts.iter().map(Layout::logits).sum();
        // Of the last layer, what comes after keys and values is done for rows with logits alone.
        let after = rows * (spec.n_layer - 1) + logits;
        let (heads, kv) = (spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim);
        let weights = match phase {
            Phase::Begin | Phase::Norm | Phase::Attention => 0,
            Phase::Qkv => rows * spec.n_layer * spec.d_model * (heads + 2 * kv),
            Phase::Output => after * spec.d_model * heads,
            Phase::GateUp => after * spec.d_model * 2 * spec.d_ff,
            Phase::Down => after * spec.d_model * spec.d_ff,
            Phase::Head => logits * spec.d_model * spec.vocab,
        };
        Work {
            bytes: layouts.len() * self.backend.weight_bytes(phase),
            dots: 2 * weights,
            fmas: 0,
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
