//! The backends, each with a pool that holds one sequence of 2,080 tokens.

use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use shoal_collective::Collective;
use shoal_collective::shm::Ring;
use shoal_collective::tcp::{Mesh, Payload, Terms};
use shoal_engine::backend::{Backend, BackendError, Batch, NumericsId};
use shoal_engine::candle::{CandleBackend, CandleOptions, CandleWeights};
use shoal_engine::cpu::{CpuBackend, CpuOptions, PromptPrecision, ShardPlan};
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_kernels::logits::{BLOCK, block_maxima};

use crate::model::demo_model;

/// 65 pages of 32 tokens.
const PAGES: u32 = 65;

/// Rows of a step, and rows that want logits.
const ROWS: usize = 256;

/// The demo model.
///
/// # Panics
/// If it is not there.
pub fn demo_gguf() -> Gguf {
    Gguf::open(&demo_model()).expect("the demo model opens")
}

/// The candle backend on the CPU: the oracle with [`CandleWeights::F32`].
///
/// # Panics
/// If the model does not load.
pub fn candle(gguf: &Gguf, weights: CandleWeights) -> CandleBackend {
    let spec = ModelSpec::from_gguf(gguf).expect("the model is supported");
    let options = CandleOptions {
        weights,
        device: candle_core::Device::Cpu,
        pages: PAGES,
        max_rows: ROWS,
        max_logit_rows: ROWS,
    };
    CandleBackend::load(gguf, spec, options).expect("the model loads")
}

/// The engine's own backend, with the best instruction set of the machine.
///
/// # Panics
/// If the model does not load.
pub fn cpu(gguf: &Gguf) -> CpuBackend {
    cpu_as(gguf, Isa::detect(), 2)
}

/// The engine's own backend.
///
/// # Panics
/// If the model does not load.
pub fn cpu_as(gguf: &Gguf, isa: Isa, threads: usize) -> CpuBackend {
    cpu_with(gguf, options(isa, threads))
}

/// The engine's own backend, with keys and values kept as `kv`.
///
/// # Panics
/// If the model does not load.
pub fn cpu_keeping(kv: KvType, gguf: &Gguf, isa: Isa, threads: usize) -> CpuBackend {
    let plain = options(isa, threads);
    cpu_with(gguf, CpuOptions { kv, ..plain })
}

/// The engine's own backend.
///
/// # Panics
/// If the model does not load.
pub fn cpu_with(gguf: &Gguf, options: CpuOptions) -> CpuBackend {
    let spec = ModelSpec::from_gguf(gguf).expect("the model is supported");
    CpuBackend::load(gguf, spec, options).expect("the model loads")
}

/// The options of the backends here: prompts in bf16 on every machine, keys and values as they are
/// by default.
pub fn options(isa: Isa, threads: usize) -> CpuOptions {
    CpuOptions {
        isa,
        prompts: PromptPrecision::Bf16,
        threads,
        kv: KvType::default(),
        pages: PAGES,
        max_rows: ROWS,
        max_logit_rows: ROWS,
    }
}

/// Longer than a busy machine holds a thread up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes a seat in a group.
type Join = Box<dyn FnOnce() -> Box<dyn Collective> + Send>;

fn in_memory(world: usize, words: usize) -> Vec<Join> {
    let seats = Ring::threads(world, words, PATIENCE).expect("memory");
    let boxed =
        seats.map(|join| -> Join { Box::new(move || Box::new(join().expect("all ranks come"))) });
    boxed.collect()
}

fn on_sockets(world: usize, words: usize, payload: Payload) -> Vec<Join> {
    let terms = Terms {
        epoch: 1,
        payload,
        words,
        patience: PATIENCE,
    };
    let seats = Mesh::threads(world, terms).expect("sockets");
    let boxed = seats.map(|mesh| -> Join { Box::new(move || Box::new(mesh)) });
    boxed.collect()
}

/// Rank 0 of a tensor-parallel group whose other ranks are threads. It checks after every step
/// that all ranks have the same residual.
pub struct CpuGroup {
    first: Option<CpuBackend>,
    residuals: Receiver<Vec<f32>>,
    others: Vec<JoinHandle<()>>,
}

impl CpuGroup {
    /// A group of `world` ranks in shared memory.
    ///
    /// # Panics
    /// If the model does not load or cannot be split so.
    pub fn new(gguf: &Gguf, world: usize, options: &CpuOptions) -> Self {
        Self::with(gguf, world, options, None)
    }

    /// A group of `world` ranks that round the parts of sums to `payload` and send them over TCP.
    ///
    /// # Panics
    /// If the model does not load or cannot be split so.
    pub fn over_tcp(gguf: &Gguf, world: usize, options: &CpuOptions, payload: Payload) -> Self {
        Self::with(gguf, world, options, Some(payload))
    }

    fn with(gguf: &Gguf, world: usize, options: &CpuOptions, tcp: Option<Payload>) -> Self {
        let spec = ModelSpec::from_gguf(gguf).expect("the model is supported");
        let plan = ShardPlan::new(&spec, world).expect("so many ranks");
        let plan = plan.with_payload(tcp.unwrap_or_default());
        let load = |rank| {
            CpuBackend::load_rank(gguf, spec.clone(), options.clone(), plan.clone(), rank)
                .expect("the model loads")
        };
        let mut first = load(0);
        let words = first.frame_words();
        let mut seats = match tcp {
            None => in_memory(world, words),
            Some(payload) => on_sockets(world, words, payload),
        }
        .into_iter();
        let join = seats.next().expect("a seat");
        let (sender, residuals) = channel();
        let others = (1..).zip(seats).map(|(rank, join)| {
            let (mut backend, sender) = (load(rank), sender.clone());
            std::thread::spawn(move || {
                backend.join(join()).expect("its seat");
                while backend.follow().is_ok() {
                    // The test may have ended.
                    let _ = sender.send(backend.residual().to_vec());
                }
            })
        });
        let others = others.collect();
        first.join(join()).expect("its seat");
        Self {
            first: Some(first),
            residuals,
            others,
        }
    }

    fn first(&self) -> &CpuBackend {
        self.first.as_ref().expect("it is here until the end")
    }
}

impl Backend for CpuGroup {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn spec(&self) -> &ModelSpec {
        self.first().spec()
    }

    fn numerics_id(&self) -> NumericsId {
        self.first().numerics_id()
    }

    fn pages(&self) -> u32 {
        self.first().pages()
    }

    fn max_rows(&self) -> usize {
        self.first().max_rows()
    }

    fn max_logit_rows(&self) -> usize {
        self.first().max_logit_rows()
    }

    fn ranks(&self) -> usize {
        self.first().ranks()
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        let first = self.first.as_mut().expect("it is here until the end");
        first.step(batch, logits)?;
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let own = bits(first.residual());
        for _ in &self.others {
            let other = self.residuals.recv_timeout(PATIENCE).expect("every rank");
            assert!(bits(&other) == own, "a rank has another residual");
        }
        let blocks = first.spec().vocab.div_ceil(BLOCK);
        let rows = logits.chunks_exact(first.spec().vocab);
        for (row, maxima) in rows.zip(first.maxima().chunks_exact(blocks)) {
            let mut expected = vec![0.0; blocks];
            block_maxima(Isa::detect(), row, &mut expected);
            assert_eq!(maxima, expected, "what the ranks found");
        }
        Ok(())
    }

    fn maxima(&self) -> &[f32] {
        self.first().maxima()
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        // The others see that rank 0 is gone.
        self.first = None;
        for other in self.others.drain(..) {
            let ended = other.join();
            assert!(ended.is_ok() || std::thread::panicking(), "a rank panicked");
        }
    }
}
