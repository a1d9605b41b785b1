//! The law, on the demo model in the whole engine: a request's tokens and log-probabilities
//! depend on the request alone, bit for bit. Whatever else runs, however prompts are cut,
//! whatever is cached, taken away or resumed.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use shoal_core::{Namespace, Sampling, Scoring, Speculation, Stopping, TokenId};
use shoal_engine::backend::Backend;
use shoal_engine::config::EngineConfig;
use shoal_engine::cpu::{CpuBackend, CpuOptions, PromptPrecision};
use shoal_engine::engine::{Engine, EngineHandle};
use shoal_engine::request::{
    Finish, Load, Logprob, Request, SequenceKey, SequenceOutput, StepSink, Usage,
};
use shoal_engine::spec::ModelSpec;
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_tests::backends::{CpuGroup, demo_gguf};
use shoal_tests::model::data;
use shoal_text::{EncodeOptions, Tokenizer, bundle_from_gguf};

/// Requests of the tests; each test runs some of them.
const REQUESTS: usize = 32;
/// Output tokens of each.
const OUTPUT: usize = 32;
/// A step of a busy machine stays far below this.
const PATIENCE: Duration = Duration::from_secs(120);

/// What differs between runs.
struct Setup {
    ranks: usize,
    kv: KvType,
    pages: u32,
    step_rows: usize,
    prefill_chunk: usize,
    prefix_cache: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ranks: 1,
            kv: KvType::default(),
            pages: 256,
            step_rows: 256,
            prefill_chunk: 256,
            prefix_cache: false,
        }
    }
}

/// What a sequence gave.
#[derive(Clone, Debug, Default)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Logprob>,
    end: Option<(Finish, Usage)>,
    first_step: u64,
    last_step: u64,
}

impl Answer {
    fn usage(&self) -> Usage {
        self.end.expect("it ended").1
    }
}

/// Sends all it is told.
struct Told {
    step: u64,
    running: u32,
    output: SequenceOutput,
}

struct Sink(Sender<Told>);

impl StepSink for Sink {
    fn publish(&mut self, step: u64, outputs: &mut Vec<SequenceOutput>, load: &Load) {
        for output in outputs.drain(..) {
            let running = load.running;
            // A test that has seen enough is gone.
            let _ = self.0.send(Told {
                step,
                running,
                output,
            });
        }
    }
}

struct Running {
    ranks: usize,
    kv: KvType,
    engine: EngineHandle,
    told: Receiver<Told>,
    answers: HashMap<u64, Answer>,
    most_running: u32,
    attempts: u32,
}

impl Running {
    fn start(setup: &Setup) -> Self {
        let gguf = demo_gguf();
        let options = CpuOptions {
            isa: Isa::detect(),
            prompts: PromptPrecision::Bf16,
            threads: 2 / setup.ranks,
            kv: setup.kv,
            pages: setup.pages,
            max_rows: 256,
            max_logit_rows: 64,
        };
        let backend: Box<dyn Backend> = match setup.ranks {
            1 => {
                let spec = ModelSpec::from_gguf(&gguf).expect("the model is supported");
                Box::new(CpuBackend::load(&gguf, spec, options).expect("the model loads"))
            }
            ranks => Box::new(CpuGroup::new(&gguf, ranks, &options)),
        };
        let config = EngineConfig {
            step_rows: setup.step_rows,
            prefill_chunk: setup.prefill_chunk,
            prefix_cache: setup.prefix_cache,
            // No step is so long that prompts must wait.
            itl_target: PATIENCE,
            ..EngineConfig::default()
        };
        let (sender, told) = channel();
        let engine = Engine::start(backend, config, Box::new(Sink(sender)));
        Self {
            ranks: setup.ranks,
            kv: setup.kv,
            engine: engine.expect("the engine starts"),
            told,
            answers: HashMap::new(),
            most_running: 0,
            attempts: 0,
        }
    }

    /// Submits a new attempt, which replaces the answer of an earlier one.
    fn submit(&mut self, mut request: Request) {
        self.attempts += 1;
        request.key.attempt = self.attempts;
        self.answers.insert(request.key.sequence, Answer::default());
        self.engine.submit(request).expect("a good request");
    }

    fn wait_until(&mut self, enough: impl Fn(&HashMap<u64, Answer>) -> bool) {
        while !enough(&self.answers) {
            let Told {
                step,
                running,
                output,
            } = self
                .told
                .recv_timeout(PATIENCE)
                .expect("the engine goes on");
            self.most_running = self.most_running.max(running);
            let answer = self
                .answers
                .get_mut(&output.key.sequence)
                .expect("it was asked for");
            if answer.tokens.is_empty() {
                answer.first_step = step;
            }
            answer.last_step = step;
            answer.tokens.extend(output.tokens);
            answer.logprobs.extend(output.logprobs);
            answer.end = output.finish.or(answer.end);
        }
    }

    fn finish(&mut self) {
        self.wait_until(|answers| answers.values().all(|answer| answer.end.is_some()));
    }

    /// Runs requests together.
    fn all(&mut self, requests: impl IntoIterator<Item = Request>) {
        requests
            .into_iter()
            .for_each(|request| self.submit(request));
        self.finish();
    }

    #[track_caller]
    fn assert_as_alone(&self, id: u64) {
        let (got, expected) = (&self.answers[&id], &alone(self.ranks, self.kv)[id as usize]);
        assert_eq!(got.tokens, expected.tokens, "request {id}");
        assert_eq!(got.logprobs, expected.logprobs, "request {id}");
        let finish = |answer: &Answer| answer.end.map(|(finish, _)| finish);
        assert_eq!(finish(got), finish(expected), "request {id}");
    }
}

/// The text, and the token of a new line.
static TEXT: LazyLock<(Vec<TokenId>, TokenId)> = LazyLock::new(|| {
    let bundle = bundle_from_gguf(&demo_gguf()).expect("a tokenizer");
    let tokenizer = Tokenizer::new(&bundle).expect("a tokenizer");
    let encode = |text: &str| {
        let tokens = tokenizer.encode(text, EncodeOptions::default());
        tokens.expect("a short text")
    };
    (encode(&data("perplexity.txt")), encode("\n")[0])
});

/// Greedy and sampled, with everything that shapes a draw; prompts of 20 tokens and more.
fn request(id: u64) -> Request {
    let (text, line_end) = &*TEXT;
    let i = id as usize;
    let greedy = Sampling {
        temperature: 0.0,
        ..Sampling::default()
    };
    let sampled = Sampling {
        seed: id,
        ..Sampling::default()
    };
    let sampling = match id % 5 {
        0 => greedy,
        1 => Sampling {
            repetition_penalty: 1.3,
            frequency_penalty: 0.5,
            ..greedy
        },
        2 => Sampling {
            temperature: 0.8,
            top_p: 0.9,
            ..sampled
        },
        3 => Sampling {
            temperature: 1.2,
            min_p: 0.05,
            logit_bias: vec![(text[0], 3.0), (text[i + 7], -100.0)],
            ..sampled
        },
        _ => Sampling {
            top_k: 40,
            top_p: 0.95,
            presence_penalty: 0.6,
            frequency_penalty: 0.4,
            repetition_penalty: 1.1,
            ..sampled
        },
    };
    Request {
        key: SequenceKey {
            session: 1,
            sequence: id,
            attempt: 0,
        },
        prompt: text[40 * i..][..20 + 3 * i].to_vec(),
        resume: Vec::new(),
        sampling,
        stopping: Stopping {
            max_tokens: OUTPUT as u32,
            min_tokens: 8,
            stop_tokens: if id.is_multiple_of(3) {
                vec![*line_end]
            } else {
                vec![]
            },
        },
        scoring: Scoring {
            output_top: Some(3),
            prompt_top: None,
        },
        namespace: Namespace::new("tenant", ""),
        priority: 0,
        deadline: None,
        speculation: Speculation::Auto,
        corpora: Vec::new(),
        lead: None,
    }
}

fn requests() -> impl Iterator<Item = Request> {
    (0..REQUESTS as u64).map(request)
}

/// Every request alone, in one chunk, with nothing cached, on one rank or two.
fn alone(ranks: usize, kv: KvType) -> &'static [Answer] {
    static ALONE: [[OnceLock<Vec<Answer>>; 2]; KvType::ALL.len()] =
        [const { [const { OnceLock::new() }; 2] }; KvType::ALL.len()];
    ALONE[kv as usize][ranks - 1].get_or_init(|| {
        let mut running = Running::start(&Setup {
            ranks,
            kv,
            ..Setup::default()
        });
        requests().for_each(|request| running.all([request]));
        assert_eq!(running.most_running, 1);
        let answers = (0..REQUESTS as u64).map(|id| running.answers[&id].clone());
        let answers: Vec<Answer> = answers.collect();
        for answer in &answers {
            assert!((8..=OUTPUT).contains(&answer.tokens.len()));
        }
        answers
    })
}

#[test]
fn in_a_batch_of_32() {
    let mut running = Running::start(&Setup::default());
    running.all(requests());
    assert_eq!(running.most_running, REQUESTS as u32);
    (0..REQUESTS as u64).for_each(|id| running.assert_as_alone(id));
}

#[test]
fn in_other_chunks() {
    for (prefill_chunk, step_rows) in [(1, 256), (7, 40), (33, 33)] {
        let mut running = Running::start(&Setup {
            prefill_chunk,
            step_rows,
            ..Setup::default()
        });
        running.all((4..24).step_by(3).map(request));
        (4..24)
            .step_by(3)
            .for_each(|id| running.assert_as_alone(id));
    }
}

#[test]
fn after_a_prefix_hit() {
    let mut running = Running::start(&Setup {
        prefix_cache: true,
        ..Setup::default()
    });
    for _ in 0..2 {
        running.all((26..32).map(request));
        (26..32).for_each(|id| running.assert_as_alone(id));
    }
    for id in 26..32 {
        assert!(running.answers[&id].usage().cached_tokens >= 64);
    }
}

#[test]
fn after_losing_its_pages() {
    // Ten sequences of which most grow by a page.
    let mut running = Running::start(&Setup {
        pages: 5,
        ..Setup::default()
    });
    running.all((0..10).map(request));
    (0..10).for_each(|id| running.assert_as_alone(id));
    let preemptions = running.answers.values().map(|a| a.usage().preemptions);
    assert!(preemptions.sum::<u32>() > 0);
}

#[test]
fn resumed_elsewhere() {
    let mut running = Running::start(&Setup::default());
    for id in 0..10 {
        let whole = &alone(1, KvType::default())[id as usize];
        for done in [0, 1, 5, whole.tokens.len() - 1, whole.tokens.len()] {
            let mut rest = request(id);
            rest.resume = whole.tokens[..done].to_vec();
            running.all([rest]);
            let got = &running.answers[&id];
            assert_eq!(
                got.tokens,
                whole.tokens[done..],
                "request {id} after {done}"
            );
            assert_eq!(got.logprobs, whole.logprobs[done..]);
        }
    }
}

#[test]
fn beside_prompts_that_arrive_late() {
    let (early, late) = (0..4, 26..32);
    let mut running = Running::start(&Setup {
        prefill_chunk: 16,
        ..Setup::default()
    });
    early.clone().for_each(|id| running.submit(request(id)));
    running.wait_until(|answers| answers.values().all(|answer| !answer.tokens.is_empty()));
    running.all(late.clone().map(request));
    early.chain(late).for_each(|id| running.assert_as_alone(id));
    // Prompts of 98 tokens and more take 7 chunks, in which the early ones went on.
    let first_late = (26..32).map(|id| running.answers[&id].first_step).min();
    let last_early = (0..4).map(|id| running.answers[&id].last_step).max();
    assert!(first_late < last_early);
}

/// In a batch and other chunks, after prefix hits, and after losing pages.
fn with(setup: impl Fn() -> Setup) {
    let mut running = Running::start(&Setup {
        prefix_cache: true,
        prefill_chunk: 33,
        ..setup()
    });
    for _ in 0..2 {
        running.all(requests());
        (0..REQUESTS as u64).for_each(|id| running.assert_as_alone(id));
    }
    assert!(running.answers[&31].usage().cached_tokens >= 64);
    let mut running = Running::start(&Setup {
        pages: 5,
        ..setup()
    });
    running.all((0..10).map(request));
    (0..10).for_each(|id| running.assert_as_alone(id));
    let preemptions = running.answers.values().map(|a| a.usage().preemptions);
    assert!(preemptions.sum::<u32>() > 0);
}

/// The tokens of a tensor-parallel group may differ from those of one rank.
#[test]
fn on_two_ranks() {
    with(|| Setup {
        ranks: 2,
        ..Setup::default()
    });
}

/// The tokens may differ from those of bf16.
#[test]
fn with_keys_and_values_in_int8() {
    with(|| Setup {
        kv: KvType::Int8,
        ..Setup::default()
    });
}
