//! Steps of the demo model on the CPU backend, beside the limits of the machine.
//!
//! `step [threads]`: on all cores if not told. Every figure is the best of many steps, for the
//! machine may be shared; with one thread it is time on the core. The share of the read
//! bandwidth counts the weights and the keys and values that a step reads once, the
//! share of the VNNI rate the products alone.

#[path = "../../kernels/benches/limits/mod.rs"]
mod limits;

use std::error::Error;
use std::hint::black_box;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use limits::{best, read_limit, vnni_limit};
use shoal_core::{PAGE_TOKENS, Role};
use shoal_engine::backend::{Backend, BackendError, Batch, Segment};
use shoal_engine::cpu::{CpuBackend, CpuOptions};
use shoal_engine::spec::ModelSpec;
use shoal_engine::weights::Weight;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::arena::Arena;
use shoal_kernels::pool::Pool;

const BATCHES: [usize; 5] = [1, 4, 8, 16, 32];
const CONTEXTS: [usize; 3] = [64, 256, 1024];
const PREFILLS: [usize; 3] = [128, 512, LONGEST];
/// The longest context, of one sequence.
const LONGEST: usize = 2048;
/// Rows of a step that prefills.
const CHUNK: usize = 512;
/// Most sequences of a step.
const SEQUENCES: usize = 32;
/// Pages of each of them: for the greatest of `CONTEXTS`.
const PAGES: usize = 1024 / PAGE_TOKENS;
/// How long each case is repeated.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A backend with room for the greatest batch, and the shapes of a step.
struct Bench {
    backend: CpuBackend,
    logits: Vec<f32>,
    seconds: fn() -> f64,
}

/// Seconds since some time.
fn wall_clock() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Seconds that this thread was on a core.
fn core_clock() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it fills in the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

impl Bench {
    /// One step of sequences that have `pages` in equal shares, with `positions` each; the
    /// last row of each wants logits.
    fn step(
        &mut self,
        sequences: usize,
        pages: Range<usize>,
        positions: Range<usize>,
    ) -> Result<f64, BackendError> {
        let (rows, share) = (positions.len(), pages.len() / sequences);
        let of_all = |each: &dyn Fn(usize, usize) -> u32| -> Vec<u32> {
            (0..sequences)
                .flat_map(|s| positions.clone().map(move |p| (s, p)))
                .map(|(s, p)| each(s, p))
                .collect()
        };
        let tokens = of_all(&|s, p| (s * 331 + p * 7919) as u32 % 40_000);
        let all_positions = of_all(&|_, p| p as u32);
        let page_table: Vec<u32> = pages.map(|page| page as u32).collect();
        let segments: Vec<Segment> = (0..sequences)
            .map(|s| Segment {
                rows: (s * rows) as u32..((s + 1) * rows) as u32,
                pages: (s * share) as u32..((s + 1) * share) as u32,
                role: Role::Output,
            })
            .collect();
        let logit_rows: Vec<u32> = segments.iter().map(|s| s.rows.end - 1).collect();
        let batch = Batch {
            tokens: &tokens,
            positions: &all_positions,
            segments: &segments,
            page_table: &page_table,
            logit_rows: &logit_rows,
        };
        let logits = &mut self.logits[..sequences * self.backend.spec().vocab];
        let start = (self.seconds)();
        self.backend.step(&batch, logits)?;
        let seconds = (self.seconds)() - start;
        black_box(logits);
        Ok(seconds)
    }

    /// The least seconds of a prefill in chunks, alone.
    fn prefill(&mut self, tokens: usize) -> Result<f64, BackendError> {
        let chunks = (0..tokens).step_by(CHUNK);
        let pages = 0..tokens.div_ceil(PAGE_TOKENS);
        let mut least = vec![f64::INFINITY; chunks.len()];
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            for (least, first) in least.iter_mut().zip(chunks.clone()) {
                *least =
                    least.min(self.step(1, pages.clone(), first..tokens.min(first + CHUNK))?);
            }
        }
        Ok(least.iter().sum())
    }

    fn decode(&mut self, sequences: usize, context: usize) -> Result<f64, BackendError> {
        let pages = 0..sequences * PAGES.max(context.div_ceil(PAGE_TOKENS));
        let mut least = f64::INFINITY;
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            least = least.min(self.step(sequences, pages.clone(), context - 1..context)?);
        }
        Ok(least)
    }
}

fn model() -> Result<PathBuf, std::env::VarError> {
    let cached = || {
        let home = PathBuf::from(std::env::var("HOME")?);
        Ok(home.join(".cache/shoal/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    };
    std::env::var("SHOAL_TEST_MODEL").map_or_else(|_| cached(), |path| Ok(path.into()))
}

fn main() -> Result<(), Box<dyn Error>> {
    let gguf = Gguf::open(&model()?)?;
    let spec = ModelSpec::from_gguf(&gguf)?;
    // Cargo passes `--bench` before what the user gives.
    let threads = match std::env::args().skip(1).find(|arg| arg != "--bench") {
        Some(threads) => threads.parse()?,
        None => std::thread::available_parallelism()?.get(),
    };
    let options = CpuOptions {
        isa: Isa::detect(),
        threads,
        pages: (SEQUENCES * PAGES) as u32,
        max_rows: CHUNK,
        max_logit_rows: SEQUENCES,
    };
    let mut backend = None;
    let seconds = best(5, || {
        backend = None;
        backend = Some(CpuBackend::load(&gguf, spec.clone(), options.clone()));
    });
    let backend = backend.ok_or("no load")??;
    println!(
        "{:?}, {threads} threads, loaded in {:.0} ms",
        options.isa,
        seconds * 1e3
    );

    let mut pool = Pool::new(threads)?;
    let mut arena = Arena::new(96 << 20)?;
    arena.as_mut_slice().fill(1);
    let read = read_limit(&mut pool, arena.as_slice());
    let vnni = vnni_limit(&mut pool).unwrap_or(f64::NAN);
    println!(
        "memory {:.1} GB/s, VNNI {:.2} TOPS",
        read / 1e9,
        vnni / 1e12
    );
    drop((pool, arena));

    let (mut bytes, mut body) = (0, 0);
    for weight in Weight::all(&spec) {
        let tensor = gguf
            .tensor(&weight.to_string())
            .ok_or("a tensor is missing")?;
        bytes += tensor.data.len();
        if let (Weight::Layer(..), [n, k]) = (weight, tensor.shape) {
            body += n * k;
        }
    }
    let head = spec.vocab * spec.d_model;
    let kv = CpuBackend::page_bytes(&spec) / PAGE_TOKENS;
    let report = |name: String,
                  rows: usize,
                  logit_rows: usize,
                  tokens: usize,
                  passes: usize,
                  seconds: f64| {
        let read_bytes = passes * bytes + tokens * kv;
        let ops = 2 * (rows * body + logit_rows * head);
        println!(
            "{name:<16} {:>9.2} ms {:>8.0} tok/s {:>5.0}% read {:>5.0}% VNNI",
            seconds * 1e3,
            rows as f64 / seconds,
            100.0 * read_bytes as f64 / seconds / read,
            100.0 * ops as f64 / seconds / vnni,
        );
    };

    let mut bench = Bench {
        logits: vec![0.0; SEQUENCES * spec.vocab],
        backend,
        seconds: if threads == 1 { core_clock } else { wall_clock },
    };
    let decode_report = |bench: &mut Bench, batch: usize, context| -> Result<(), BackendError> {
        let seconds = bench.decode(batch, context)?;
        let name = format!("decode {batch:>2} x {context}");
        report(name, batch, batch, batch * context, 1, seconds);
        Ok(())
    };
    for tokens in PREFILLS {
        let seconds = bench.prefill(tokens)?;
        let passes = tokens.div_ceil(CHUNK);
        report(
            format!("prefill {tokens}"),
            tokens,
            passes,
            tokens,
            passes,
            seconds,
        );
    }
    decode_report(&mut bench, 1, LONGEST)?;
    // Memory that was never written is one page of zeros, which no cache has to fetch.
    for first in (0..SEQUENCES * PAGES).step_by(SEQUENCES) {
        bench.step(SEQUENCES, first..first + SEQUENCES, 0..1)?;
    }
    for context in CONTEXTS {
        for batch in BATCHES {
            decode_report(&mut bench, batch, context)?;
        }
    }
    Ok(())
}
