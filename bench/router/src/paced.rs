//! Workers with a backend that takes time and computes nothing: each token is followed by
//! itself.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use shoal_core::Speculation;
use shoal_engine::{
    backend::{Backend, BackendError, Batch, NumericsId},
    spec::ModelSpec,
};
use shoal_fabric::{
    net::{Limits, ListenConfig, Network},
    shutdown::Shutdown,
};
use shoal_proto::worker::{TokenizerBundle, tokenizer_bundle::Kind};
use shoal_worker::{Loaded, WorkerConfig, run_with};

use crate::Result;

/// Tokens of single bytes; the marks of streams follow.
pub(crate) const BYTES: u32 = 256;
/// In the text of every stream's mark, and nowhere else in it.
pub(crate) const MARK: u8 = b'~';

/// How long steps take, and how much a worker holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) step: Duration,
    /// For each row beside the first of a sequence's last token.
    pub(crate) prefill_row: Duration,
    pub(crate) decode_row: Duration,
    pub(crate) pages: u32,
    pub(crate) max_running: usize,
}

/// When each token of each stream was made: nanoseconds since the start of this process.
#[derive(Debug)]
pub(crate) struct Stamps(Vec<Vec<AtomicU64>>);

impl Stamps {
    /// Of so many streams, with so many tokens each.
    pub(crate) fn new(streams: usize, tokens: usize) -> Arc<Self> {
        let row = || (0..tokens).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self((0..streams).map(|_| row()).collect()))
    }

    pub(crate) fn streams(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn tokens(&self) -> usize {
        self.0.first().map_or(0, Vec::len)
    }

    /// The token is made now.
    pub(crate) fn make(&self, stream: usize, token: usize) {
        if let Some(stamp) = self.0.get(stream).and_then(|row| row.get(token)) {
            stamp.store(now(), Ordering::Relaxed);
        }
    }

    /// Seconds from its making to now.
    pub(crate) fn age(&self, stream: usize, token: usize) -> Option<f64> {
        let stamp = self.0.get(stream)?.get(token)?.load(Ordering::Relaxed);
        (stamp > 0).then(|| (now() - stamp) as f64 / 1e9)
    }
}

fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64 + 1
}

struct PacedBackend {
    spec: ModelSpec,
    pace: Pace,
    busy: Arc<AtomicU64>,
    stamps: Arc<Stamps>,
}

impl Backend for PacedBackend {
    fn name(&self) -> &'static str {
        "paced"
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn numerics_id(&self) -> NumericsId {
        NumericsId([1; 32])
    }

    fn pages(&self) -> u32 {
        self.pace.pages
    }

    fn max_rows(&self) -> usize {
        2048
    }

    fn max_logit_rows(&self) -> usize {
        2048
    }

    fn step(
        &mut self,
        batch: &Batch<'_>,
        logits: &mut [f32],
    ) -> std::result::Result<(), BackendError> {
        let decodes = batch.logit_rows.len() as u32;
        let prefills = batch.tokens.len() as u32 - decodes;
        let time =
            self.pace.step + self.pace.prefill_row * prefills + self.pace.decode_row * decodes;
        thread::sleep(time);
        self.busy
            .fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        let vocab = self.spec.vocab;
        for (out, &row) in logits.chunks_exact_mut(vocab).zip(batch.logit_rows) {
            let token = batch.tokens[row as usize];
            out.fill(0.0);
            out[token as usize] = 1.0;
            if let Some(stream) = token.checked_sub(BYTES) {
                let position = batch.positions[row as usize] as usize;
                self.stamps.make(stream as usize, position);
            }
        }
        Ok(())
    }
}

/// Bytes in GPT-2's spelling, then a mark per stream.
fn tokenizer(streams: usize) -> TokenizerBundle {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let spelled = |b: u8| match printable(b) {
        true => char::from(b),
        false => {
            let rank = (0..b).filter(|&b| !printable(b)).count() as u32;
            char::from_u32(256 + rank).unwrap_or_default()
        }
    };
    let bytes = (0..=255).map(|b| spelled(b).to_string());
    let marks = (0..streams).map(|i| format!("~{i};"));
    TokenizerBundle {
        kind: Kind::ByteBpe as i32,
        pre: "gpt-2".into(),
        tokens: bytes.chain(marks).collect(),
        token_types: vec![1; 256 + streams],
        ..TokenizerBundle::default()
    }
}

/// A worker of this process.
#[derive(Debug)]
pub(crate) struct PacedWorker {
    pub(crate) address: SocketAddr,
    busy: Arc<AtomicU64>,
    shutdown: Shutdown,
}

impl Drop for PacedWorker {
    fn drop(&mut self) {
        self.shutdown.start();
    }
}

impl PacedWorker {
    /// Starts one and waits until it serves.
    pub(crate) async fn start(pace: Pace, stamps: &Arc<Stamps>) -> Result<Self> {
        let listen = ListenConfig {
            network: Network::Tcp,
            address: ([127, 0, 0, 1], 0).into(),
            tls: None,
            limits: Limits::default(),
        };
        let mut config = WorkerConfig::new("paced.gguf".into(), listen);
        config.engine.max_running = pace.max_running;
        config.engine.step_rows = 2048;
        // Its tokens repeat: drafts would make many in a step.
        config.engine.speculation = Speculation::Off;
        config.drain = Duration::ZERO;
        let (busy, stamps) = (Arc::new(AtomicU64::new(0)), stamps.clone());
        let meter = busy.clone();
        let shutdown = Shutdown::new();
        let load = move |_: &WorkerConfig| {
            let context = 4096.max(stamps.tokens() + 32);
            Ok(Loaded {
                tokenizer: tokenizer(stamps.streams()),
                backend: Box::new(PacedBackend {
                    spec: ModelSpec::weightless("paced", 256 + stamps.streams(), context),
                    pace,
                    busy: meter,
                    stamps,
                }) as Box<dyn Backend>,
                group: None,
            })
        };
        let mut phase = shutdown.phase();
        tokio::spawn(run_with(config, shutdown.clone(), load));
        let phase = *phase.wait_for(|phase| phase.ready).await?;
        Ok(Self {
            address: phase.address.ok_or("the worker has no address")?,
            busy,
            shutdown,
        })
    }

    /// Time spent in steps, in seconds.
    pub(crate) fn busy(&self) -> f64 {
        self.busy.load(Ordering::Relaxed) as f64 / 1e6
    }
}

/// Several of them.
pub(crate) async fn workers(
    count: usize,
    pace: Pace,
    stamps: &Arc<Stamps>,
) -> Result<Vec<PacedWorker>> {
    let mut workers = Vec::with_capacity(count);
    for _ in 0..count {
        workers.push(PacedWorker::start(pace, stamps).await?);
    }
    Ok(workers)
}
