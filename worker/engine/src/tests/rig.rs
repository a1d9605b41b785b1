//! A stepper driven by hand, with a clock that stands still until told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shoal_core::{Namespace, Sampling, Scoring, Speculation, Stopping};

use super::fake::FakeBackend;
use crate::backend::Backend;
use crate::config::{EngineConfig, Limits};
use crate::metrics::EngineMetrics;
use crate::request::{Finish, Logprob, Request, SequenceKey, SubmitError, Usage};
use crate::sequence::Sequence;
use crate::step::Stepper;

pub(crate) fn key(sequence: u64) -> SequenceKey {
    SequenceKey {
        session: 1,
        sequence,
        attempt: 0,
    }
}

/// A sampled request of `max_tokens` output tokens.
pub(crate) fn request(id: u64, prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        key: key(id),
        prompt,
        resume: Vec::new(),
        sampling: Sampling {
            seed: id,
            ..Sampling::default()
        },
        stopping: Stopping {
            max_tokens,
            ..Stopping::default()
        },
        scoring: Scoring::default(),
        namespace: Namespace::new("tenant", ""),
        priority: 0,
        deadline: None,
        speculation: Speculation::Auto,
        corpora: Vec::new(),
        lead: None,
    }
}

/// All that came out for one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Collected {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<Logprob>,
    pub(crate) prompt_logprobs: Vec<Logprob>,
    pub(crate) finish: Option<(Finish, Usage)>,
}

impl Collected {
    pub(crate) fn finish(&self) -> Option<Finish> {
        self.finish.map(|(finish, _)| finish)
    }
}

pub(crate) struct Rig {
    pub(crate) stepper: Stepper,
    pub(crate) metrics: EngineMetrics,
    pub(crate) collected: HashMap<SequenceKey, Collected>,
    limits: Limits,
    resumed: HashMap<SequenceKey, usize>,
    millis: Arc<AtomicU64>,
    pace: Arc<AtomicU64>,
    start: Instant,
    ordinal: u64,
}

impl Rig {
    pub(crate) fn new(backend: FakeBackend, config: &EngineConfig) -> Self {
        let limits = Limits::resolve(config, &backend).expect("settings");
        let metrics = EngineMetrics::default();
        let (start, millis) = (Instant::now(), backend.probe().clock);
        let time = Arc::clone(&millis);
        let pace = Arc::new(AtomicU64::new(0));
        let passes = Arc::clone(&pace);
        let clock = move || {
            let passing = passes.load(Ordering::Relaxed);
            start + Duration::from_millis(time.fetch_add(passing, Ordering::Relaxed))
        };
        Self {
            stepper: Stepper::new(
                Box::new(backend),
                limits.clone(),
                metrics.clone(),
                Box::new(clock),
            ),
            metrics,
            collected: HashMap::new(),
            limits,
            resumed: HashMap::new(),
            millis,
            pace,
            start,
            ordinal: 0,
        }
    }

    /// The time `millis` after the start.
    pub(crate) fn at(&self, millis: u64) -> Instant {
        self.start + Duration::from_millis(millis)
    }

    pub(crate) fn set_time(&self, millis: u64) {
        self.millis.store(millis, Ordering::Relaxed);
    }

    /// Lets so many milliseconds pass with every look at the clock.
    pub(crate) fn set_pace(&self, millis: u64) {
        self.pace.store(millis, Ordering::Relaxed);
    }

    pub(crate) fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        let numerics = crate::backend::NumericsId([7; 32]);
        let resumed = request.resume.len();
        let now = self.stepper.now();
        let mut sequence = Sequence::new(request, &self.limits, &numerics, now)?;
        self.ordinal += 1;
        sequence.enter(self.ordinal, now - self.start, self.limits.priority_aging);
        self.resumed.insert(sequence.key, resumed);
        self.stepper.submit(Box::new(sequence));
        Ok(())
    }

    /// Runs a step, checks its outputs' offsets and the pool's books.
    pub(crate) fn step(&mut self) {
        self.stepper.step().expect("no fatal fault");
        self.collect();
        self.stepper.check();
    }

    pub(crate) fn cancel(&mut self, id: u64) {
        self.stepper.end(Finish::Cancelled, |s| s.key == key(id));
        self.collect();
    }

    fn collect(&mut self) {
        let (output, _) = self.stepper.output();
        for output in output.sequences.drain(..) {
            let collected = self.collected.entry(output.key).or_default();
            assert_eq!(collected.finish, None, "output after the end");
            let resumed = self.resumed[&output.key];
            assert_eq!(output.offset as usize, resumed + collected.tokens.len());
            collected.tokens.extend(output.tokens);
            collected.logprobs.extend(output.logprobs);
            if !output.prompt_logprobs.is_empty() {
                assert!(collected.prompt_logprobs.is_empty());
                collected.prompt_logprobs = output.prompt_logprobs;
            }
            collected.finish = output.finish;
        }
        output.ended.clear();
        output.pages.clear();
    }

    /// Steps until nothing is left.
    pub(crate) fn run(&mut self) {
        for _ in 0..100_000 {
            if self.stepper.is_empty() {
                self.collect();
                return;
            }
            self.step();
        }
        panic!("no end in sight");
    }

    pub(crate) fn of(&self, id: u64) -> &Collected {
        &self.collected[&key(id)]
    }
}

/// The tokens a request gives alone, in one chunk, with nothing cached and nothing drafted.
pub(crate) fn alone(request: Request, vocab: usize, context: usize) -> Collected {
    let backend = FakeBackend::new(256, super::fake::spec(vocab, context));
    assert!(backend.max_rows() > request.prompt.len());
    let config = EngineConfig {
        prefill_chunk: 4096,
        step_rows: 4096,
        prefix_cache: false,
        speculation: Speculation::Off,
        ..EngineConfig::default()
    };
    let mut rig = Rig::new(backend, &config);
    let id = request.key.sequence;
    rig.submit(request).expect("a good request");
    rig.run();
    rig.of(id).clone()
}
