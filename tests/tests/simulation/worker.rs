//! A real worker, whose engine steps in simulated time over a model of no weights: the logits of
//! a row are a function of every token before it, as the KV pages remember them.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use shoal_engine::{
    backend::{Backend, BackendError, Batch, NumericsId},
    config::EngineConfig,
    engine::{Driver, Engine, EngineHandle, Turn},
    spec::ModelSpec,
};
use shoal_fabric::{
    membership::Etcd,
    net::{Limits, ListenConfig, Network},
    shutdown::Shutdown,
};
use shoal_proto::worker::{TokenizerBundle, tokenizer_bundle::Kind};
use shoal_worker::{Loaded, WorkerConfig, run_driven};
use tokio::{runtime::Handle, time::sleep};

use crate::etcd;

pub(crate) const MODEL: &str = "tiny";
pub(crate) const PORT: u16 = 9090;
/// The tokens that prompts and answers are made of: the letters.
pub(crate) const LETTERS: std::ops::Range<u32> = 97..123;
const VOCAB: usize = 257;
/// One page of tokens.
const PAGE: usize = shoal_core::PAGE_TOKENS;
/// Small, so that sequences are preempted now and then.
const PAGES: u32 = 48;
/// What a step takes, and each of its rows.
const STEP: Duration = Duration::from_millis(15);
const ROW: Duration = Duration::from_micros(500);
/// For the sequences of a worker that ends in order.
const DRAIN: Duration = Duration::from_secs(1);
/// Between looks at an idle engine.
const LOOK: Duration = Duration::from_millis(5);

/// One token per byte and the end.
fn tokenizer() -> TokenizerBundle {
    let byte = |b: u8| match b {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
        // GPT-2's printable stand-ins; nobody looks at which.
        other => char::from_u32(0x400 + u32::from(other)).unwrap(),
    };
    let mut tokens: Vec<String> = (0..=255).map(|b| byte(b).to_string()).collect();
    tokens.push("<end>".into());
    let mut token_types = vec![1; 256];
    token_types.push(3);
    TokenizerBundle {
        kind: Kind::ByteBpe as i32,
        pre: "gpt-2".into(),
        tokens,
        token_types,
        eos: Some(256),
        end_tokens: vec![256],
        ..TokenizerBundle::default()
    }
}

fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// See the [module](self).
#[derive(Debug)]
struct Model {
    spec: ModelSpec,
    /// Of each place in the pool, a hash of the tokens up to there.
    past: Vec<u64>,
    clock: Arc<StepClock>,
    held: Held,
}

/// The time, a step's own included, which passes only after it.
#[derive(Debug, Default)]
struct StepClock(AtomicU64);

impl StepClock {
    fn spend(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn now(&self) -> Instant {
        Instant::now() + Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    async fn pass(&self) {
        sleep(Duration::from_nanos(self.0.load(Ordering::Relaxed))).await;
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Model {
    fn new(clock: Arc<StepClock>, held: Held) -> Self {
        let spec = ModelSpec::weightless(MODEL, VOCAB, 512);
        Self {
            spec,
            past: vec![0; PAGES as usize * PAGE],
            clock,
            held,
        }
    }
}

impl Backend for Model {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn numerics_id(&self) -> NumericsId {
        NumericsId([7; 32])
    }

    fn pages(&self) -> u32 {
        PAGES
    }

    fn max_rows(&self) -> usize {
        128
    }

    fn max_logit_rows(&self) -> usize {
        128
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        self.clock.spend(STEP + ROW * batch.tokens.len() as u32);
        match self.held.lock().unwrap().fails.take() {
            None => {}
            Some(Failure::Pages) => {
                self.past.fill(0);
                return Err(BackendError::NoGroup);
            }
            Some(Failure::Device) => return Err(BackendError::Device("as drawn".into())),
            Some(Failure::Model) => return Err(BackendError::Plan),
        }
        let mut hashes = vec![0; batch.tokens.len()];
        for segment in batch.segments {
            let pages = &batch.page_table[segment.pages.start as usize..segment.pages.end as usize];
            let place = |position: usize| pages[position / PAGE] as usize * PAGE + position % PAGE;
            for row in segment.rows.start as usize..segment.rows.end as usize {
                let position = batch.positions[row] as usize;
                let before = position.checked_sub(1).map_or(1, |p| self.past[place(p)]);
                hashes[row] = mix(before, batch.tokens[row].into());
                self.past[place(position)] = hashes[row];
            }
        }
        for (out, &row) in logits.chunks_exact_mut(VOCAB).zip(batch.logit_rows) {
            out.fill(-30.0);
            for letter in LETTERS {
                let noise = mix(hashes[row as usize], u64::from(letter) << 32);
                out[letter as usize] = (noise >> 40) as f32 / (1 << 22) as f32;
            }
        }
        Ok(())
    }
}

/// How a step fails.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failure {
    /// All pages are lost.
    Pages,
    /// The next one may be better.
    Device,
    /// There is no other one, and the process ends.
    Model,
}

/// What the simulation holds of a worker's process.
#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// Its engine makes no step.
    pub(crate) hung: bool,
    /// Its next step does.
    pub(crate) fails: Option<Failure>,
    /// The process has ended in failure.
    pub(crate) failed: bool,
    pub(crate) engine: Option<EngineHandle>,
    pub(crate) shutdown: Option<Shutdown>,
}

/// A hand on a worker, whichever process it is by now.
pub(crate) type Held = Arc<Mutex<Hand>>;

/// The process, until its host crashes or it is shut down.
pub(crate) async fn run(
    name: String,
    engine: EngineConfig,
    network: Network,
    held: Held,
) -> turmoil::Result {
    let shutdown = Shutdown::new();
    *held.lock().unwrap() = Hand {
        shutdown: Some(shutdown.clone()),
        ..Hand::default()
    };
    let listen = ListenConfig {
        network: network.clone(),
        address: ([0, 0, 0, 0], PORT).into(),
        tls: None,
        limits: Limits::default(),
    };
    let mut config = WorkerConfig::new(format!("{MODEL}.gguf").into(), listen);
    config.membership = Arc::new(Etcd::on(Handle::current(), etcd::config(network))?);
    config.group = Some(name.clone());
    config.advertise = Some(format!("{name}:{PORT}").parse()?);
    config.engine = engine;
    config.drain = DRAIN;
    let clock = Arc::new(StepClock::default());
    let model = Model::new(clock.clone(), held.clone());
    let load = |_: &WorkerConfig| {
        Ok(Loaded {
            backend: Box::new(model),
            tokenizer: tokenizer(),
            group: None,
        })
    };
    let start = move |backend, config, sink| {
        let time = clock.clone();
        let now = Box::new(move || time.now());
        let (engine, driver) = Engine::driven(backend, config, sink, now)?;
        held.lock().unwrap().engine = Some(engine.clone());
        tokio::spawn(drive(driver, clock, held));
        Ok(engine)
    };
    run_driven(config, shutdown, load, start).await?;
    Ok(())
}

async fn drive(mut driver: Driver, clock: Arc<StepClock>, held: Held) {
    loop {
        if held.lock().unwrap().hung {
            sleep(LOOK).await;
            continue;
        }
        match driver.turn() {
            Turn::Stepped => clock.pass().await,
            Turn::Idle => sleep(LOOK).await,
            Turn::Ended => return,
        }
    }
}

/// The answers of a worker that nothing ever happens to.
pub(crate) mod undisturbed {
    use std::collections::HashMap;

    use shoal_core::{Namespace, Sampling, Scoring, Speculation, Stopping};
    use shoal_engine::request::{Load, PageChange, Request, SequenceKey, SequenceOutput, StepSink};

    use super::*;
    use crate::client::Plan;

    /// The tokens of each choice of each request.
    pub(crate) type Tokens = HashMap<(u64, u32), Vec<u32>>;

    #[derive(Clone, Default)]
    struct Answers(Arc<Mutex<Tokens>>);

    impl StepSink for Answers {
        fn publish(&mut self, _: u64, outputs: &mut Vec<SequenceOutput>, _: &Load) {
            let mut answers = self.0.lock().unwrap();
            for output in outputs.drain(..) {
                let key = (output.key.sequence, output.key.attempt);
                answers.entry(key).or_default().extend(output.tokens);
            }
        }

        fn cached(&mut self, _: &[PageChange]) {}
    }

    /// The tokens of every choice of every request, each alone.
    pub(crate) fn answers<'a>(plans: impl Iterator<Item = &'a Plan>) -> Tokens {
        let sink = Answers::default();
        let model = Box::new(Model::new(Arc::default(), Held::default()));
        let config = EngineConfig {
            speculation: Speculation::Off,
            prefix_cache: false,
            ..EngineConfig::default()
        };
        let clock = Box::new(Instant::now);
        let started = Engine::driven(model, config, Box::new(sink.clone()), clock);
        let (engine, mut driver) = started.unwrap();
        for plan in plans {
            for choice in 0..plan.choices {
                let request = Request {
                    key: SequenceKey {
                        session: 0,
                        sequence: plan.id,
                        attempt: choice,
                    },
                    prompt: plan.prompt.clone(),
                    resume: Vec::new(),
                    sampling: Sampling {
                        temperature: plan.temperature,
                        seed: plan.seed,
                        choice,
                        ..Sampling::default()
                    },
                    stopping: Stopping {
                        max_tokens: plan.max_tokens,
                        ..Stopping::default()
                    },
                    scoring: Scoring::default(),
                    namespace: Namespace::new("", ""),
                    priority: 0,
                    deadline: None,
                    speculation: Speculation::Off,
                    corpora: Vec::new(),
                    lead: None,
                };
                engine.submit(request).unwrap();
                while driver.turn() == Turn::Stepped {}
            }
        }
        std::mem::take(&mut *sink.0.lock().unwrap())
    }
}
