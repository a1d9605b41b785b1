//! Every metric of a router, under the prefix `shoal_`.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Weak},
};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    },
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
};
use shoal_fabric::metrics::{Registry, latency_histogram, step_histogram};
use tokio::time::Instant;
use tonic::Code;
use tracing::{Instrument, Span};

use crate::{admission::Admission, cluster::Cluster};

/// The door and the answer of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    /// The route's pattern, or the gRPC method.
    pub(crate) route: String,
    pub(crate) code: Outcome,
}

/// How an answer ended, as a label: `404`, `NotFound`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    Http(u16),
    Grpc(Code),
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        match self {
            Self::Http(status) => status.encode(encoder),
            Self::Grpc(code) => write!(encoder, "{code:?}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    router: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

/// A part of a request's way through the router: a span and a duration.
#[derive(Clone, Debug)]
pub(crate) struct Stage(Histogram);

impl Stage {
    /// Runs a request's work of this stage inside `span`.
    pub(crate) async fn run<T>(&self, span: Span, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let result = work.instrument(span).await;
        self.0.observe(begun.elapsed().as_secs_f64());
        result
    }
}

/// The parts of a request's way through the router.
#[derive(Clone, Debug)]
pub(crate) struct Stages {
    /// Template, tokens and validation.
    pub(crate) text: Stage,
    /// The wait for a place in the cluster.
    pub(crate) admission: Stage,
    /// The choice of a worker, and the submission to it.
    pub(crate) placement: Stage,
}

impl Stages {
    fn new(family: &Family<StageLabels, Histogram>) -> Self {
        let stage = |stage| Stage(family.get_or_create_owned(&StageLabels { stage }));
        Self {
            text: stage("text"),
            admission: stage("admission"),
            placement: stage("placement"),
        }
    }
}

/// From 10 µs to 1 s, in seconds.
fn stage_histogram() -> Histogram {
    Histogram::new([
        0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
        0.1, 1.0,
    ])
}

/// Handles to the metrics of one model.
#[derive(Clone, Debug)]
pub(crate) struct ModelMetrics {
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) end_to_end: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) prompt_tokens: Counter,
    pub(crate) cached_tokens: Counter,
    pub(crate) output_tokens: Counter,
    pub(crate) abandoned: Counter,
}

/// Handles to the metrics of the exchange with another router.
#[derive(Clone, Debug)]
pub(crate) struct PeerMetrics {
    pub(crate) sent: Counter,
    pub(crate) received: Counter,
    pub(crate) lag: Gauge,
}

/// The metrics of a router; clones are the same ones.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    pub(crate) requests: Family<RequestLabels, Counter>,
    pub(crate) resubmissions: Counter,
    pub(crate) stages: Stages,
    pub(crate) refused_retries: Counter,
    pub(crate) suspicions: Counter,
    pub(crate) placed_tokens: Counter,
    pub(crate) placed_cached_tokens: Counter,
    pub(crate) led_sequences: Counter,
    pub(crate) led_tokens: Counter,
    pub(crate) led_right_tokens: Counter,
    corpus_sent: Family<PeerLabels, Counter>,
    corpus_received: Family<PeerLabels, Counter>,
    corpus_lag: Family<PeerLabels, Gauge>,
    rejects: Family<RejectLabels, Counter>,
    time_to_first_token: Family<ModelLabels, Histogram>,
    inter_token: Family<ModelLabels, Histogram>,
    end_to_end: Family<ModelLabels, Histogram>,
    queue_time: Family<ModelLabels, Histogram>,
    prompt_tokens: Family<ModelLabels, Counter>,
    cached_tokens: Family<ModelLabels, Counter>,
    output_tokens: Family<ModelLabels, Counter>,
    abandoned: Family<ModelLabels, Counter>,
}

impl Metrics {
    /// Registers them all.
    pub(crate) fn new(registry: &Registry) -> Self {
        let stages: Family<_, Histogram> = Family::new_with_constructor(stage_histogram);
        let new = Self {
            stages: Stages::new(&stages),
            requests: Family::default(),
            resubmissions: Counter::default(),
            refused_retries: Counter::default(),
            suspicions: Counter::default(),
            placed_tokens: Counter::default(),
            placed_cached_tokens: Counter::default(),
            led_sequences: Counter::default(),
            led_tokens: Counter::default(),
            led_right_tokens: Counter::default(),
            corpus_sent: Family::default(),
            corpus_received: Family::default(),
            corpus_lag: Family::default(),
            rejects: Family::default(),
            time_to_first_token: Family::new_with_constructor(latency_histogram),
            inter_token: Family::new_with_constructor(step_histogram),
            end_to_end: Family::new_with_constructor(latency_histogram),
            queue_time: Family::new_with_constructor(latency_histogram),
            prompt_tokens: Family::default(),
            cached_tokens: Family::default(),
            output_tokens: Family::default(),
            abandoned: Family::default(),
        };
        let m = new.clone();
        registry.register(|r| {
            r.register(
                "stage_seconds",
                "What the stages of a request's way through the router take",
                stages,
            );
            r.register(
                "requests",
                "Requests by route and HTTP status or gRPC code",
                m.requests,
            );
            r.register(
                "resubmissions",
                "Sequences given to another worker, or to the same one again",
                m.resubmissions,
            );
            r.register(
                "refused_retries",
                "Sequences that were not tried again because the retry budget was spent",
                m.refused_retries,
            );
            r.register(
                "worker_suspicions",
                "Times a worker was taken for dead or hung",
                m.suspicions,
            );
            r.register(
                "placed_tokens",
                "Tokens of placed sequences, prompt and resumed output",
                m.placed_tokens,
            );
            r.register(
                "placed_cached_tokens",
                "Of those, the ones that the index of pages says the worker holds",
                m.placed_cached_tokens,
            );
            r.register(
                "led_sequences",
                "Sequences that a draft worker began to run ahead of",
                m.led_sequences,
            );
            r.register(
                "led_tokens",
                "Output tokens of sequences while a draft worker ran ahead of them",
                m.led_tokens,
            );
            r.register(
                "led_right_tokens",
                "Of those, the ones that the draft worker had said before",
                m.led_right_tokens,
            );
            r.register(
                "corpus_sent_entries",
                "Entries of the logs of text that drafts, told to another router",
                m.corpus_sent,
            );
            r.register(
                "corpus_received_entries",
                "The same, heard of it",
                m.corpus_received,
            );
            r.register(
                "corpus_lag_entries",
                "Offsets of another router's log that were yet to come when it last told of it",
                m.corpus_lag,
            );
            r.register(
                "rejects",
                "Requests refused or failed, by reason",
                m.rejects,
            );
            r.register(
                "time_to_first_token_seconds",
                "From the request's arrival to its first output token",
                m.time_to_first_token,
            );
            r.register(
                "time_per_output_token_seconds",
                "Between output tokens of a choice",
                m.inter_token,
            );
            r.register(
                "e2e_request_latency_seconds",
                "From the request's arrival to the end of its answer",
                m.end_to_end,
            );
            r.register(
                "request_queue_time_seconds",
                "From the request's arrival to its admission",
                m.queue_time,
            );
            r.register(
                "prompt_tokens",
                "Prompt tokens of admitted requests",
                m.prompt_tokens,
            );
            r.register(
                "cached_prompt_tokens",
                "Prompt tokens that a worker found in its prefix cache",
                m.cached_tokens,
            );
            r.register("output_tokens", "Output tokens", m.output_tokens);
            r.register(
                "requests_abandoned",
                "Answers whose client left or which failed before their end",
                m.abandoned,
            );
        });
        new
    }

    /// Counts a refusal or a failure.
    pub(crate) fn rejected(&self, reason: &'static str) {
        self.rejects.get_or_create(&RejectLabels { reason }).inc();
    }

    /// The metrics of the exchange with the router at an address.
    pub(crate) fn peer(&self, router: Arc<str>) -> PeerMetrics {
        let labels = PeerLabels { router };
        PeerMetrics {
            sent: self.corpus_sent.get_or_create_owned(&labels),
            received: self.corpus_received.get_or_create_owned(&labels),
            lag: self.corpus_lag.get_or_create_owned(&labels),
        }
    }

    /// The metrics of one model, looked up once per request.
    pub(crate) fn model(&self, model: Arc<str>) -> ModelMetrics {
        let labels = ModelLabels { model };
        ModelMetrics {
            time_to_first_token: self.time_to_first_token.get_or_create_owned(&labels),
            inter_token: self.inter_token.get_or_create_owned(&labels),
            end_to_end: self.end_to_end.get_or_create_owned(&labels),
            queue_time: self.queue_time.get_or_create_owned(&labels),
            prompt_tokens: self.prompt_tokens.get_or_create_owned(&labels),
            cached_tokens: self.cached_tokens.get_or_create_owned(&labels),
            output_tokens: self.output_tokens.get_or_create_owned(&labels),
            abandoned: self.abandoned.get_or_create_owned(&labels),
        }
    }
}

/// Reads the state of queue and workers whenever somebody scrapes.
#[derive(Debug)]
pub(crate) struct StateCollector {
    pub(crate) admission: Weak<Admission>,
    pub(crate) cluster: Weak<Cluster>,
}

impl Collector for StateCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (Some(admission), Some(cluster)) = (self.admission.upgrade(), self.cluster.upgrade())
        else {
            return Ok(());
        };
        for (name, help, value) in [
            (
                "requests_running",
                "Sequences at the workers",
                admission.running(),
            ),
            (
                "requests_waiting",
                "Requests that wait for admission",
                admission.waiting(),
            ),
        ] {
            let gauge = ConstGauge::new(i64::from(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let workers = cluster.status();
        let mut family = |name: &str, help: &str, value: fn(&WorkerStatus) -> i64| {
            let kind = prometheus_client::metrics::MetricType::Gauge;
            let mut descriptor = encoder.encode_descriptor(name, help, None, kind)?;
            for status in &workers {
                let labels = WorkerLabels {
                    worker: status.worker.clone(),
                };
                let gauge = ConstGauge::new(value(status));
                gauge.encode(descriptor.encode_family(&labels)?)?;
            }
            Ok(())
        };
        family("worker_up", "A session to the worker is open", |w| {
            w.up.into()
        })?;
        family("worker_ready", "The worker takes sequences", |w| {
            w.ready.into()
        })?;
        family("worker_sequences", "Sequences placed on the worker", |w| {
            w.sequences.into()
        })?;
        family(
            "worker_running",
            "Sequences that the worker runs for all routers, as it said last",
            |w| w.running.into(),
        )?;
        family(
            "worker_suspected",
            "The worker has given no sign of life for too long",
            |w| w.suspected.into(),
        )?;
        family(
            "worker_breaker_open",
            "The worker failed several sequences in a row and is kept free of them",
            |w| w.breaker_open.into(),
        )?;
        family(
            "worker_cached_pages",
            "Pages of the worker's prefix cache that this router knows",
            |w| w.cached_pages as i64,
        )
    }
}

/// One worker, as the metrics show it.
#[derive(Clone, Debug)]
pub(crate) struct WorkerStatus {
    pub(crate) worker: Arc<str>,
    pub(crate) up: bool,
    pub(crate) ready: bool,
    pub(crate) suspected: bool,
    pub(crate) breaker_open: bool,
    pub(crate) sequences: u32,
    /// As the worker said last.
    pub(crate) running: u32,
    /// Pages of the index.
    pub(crate) cached_pages: usize,
}
