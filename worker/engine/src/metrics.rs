//! What the engine tells about itself: Prometheus metrics, and the load it reports with
//! every step.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::request::Load;
use crate::speculation::DraftMetrics;

type FloatGauge = Gauge<f64, std::sync::atomic::AtomicU64>;

/// The engine's metrics. Clones share their values.
#[derive(Clone, Debug)]
pub struct EngineMetrics {
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) kv_usage: FloatGauge,
    pub(crate) prefix_queries: Counter,
    pub(crate) prefix_hits: Counter,
    pub(crate) prefill_tokens: Counter,
    pub(crate) decode_tokens: Counter,
    pub(crate) preemptions: Counter,
    pub(crate) failed_steps: Counter,
    pub(crate) step_time: Histogram,
    pub(crate) step_rows: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) drafts: DraftMetrics,
}

impl Default for EngineMetrics {
    fn default() -> Self {
        Self {
            running: Gauge::default(),
            waiting: Gauge::default(),
            kv_usage: FloatGauge::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            prefill_tokens: Counter::default(),
            decode_tokens: Counter::default(),
            preemptions: Counter::default(),
            failed_steps: Counter::default(),
            // 0.25 ms to 4 s.
            step_time: Histogram::new(exponential_buckets(2.5e-4, 2.0, 15)),
            step_rows: Histogram::new(exponential_buckets(1.0, 2.0, 11)),
            // 1 ms to 65 s.
            queue_time: Histogram::new(exponential_buckets(1e-3, 2.0, 17)),
            drafts: DraftMetrics::default(),
        }
    }
}

impl EngineMetrics {
    /// Registers every metric as `engine_…`, under the registry's own prefix.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("engine");
        r.register(
            "running_sequences",
            "Sequences that hold pages",
            self.running.clone(),
        );
        r.register(
            "waiting_sequences",
            "Sequences that wait for their first step or for their pages back",
            self.waiting.clone(),
        );
        r.register(
            "kv_usage_ratio",
            "Share of the KV pages that sequences hold",
            self.kv_usage.clone(),
        );
        r.register(
            "prefix_cache_query_tokens",
            "Prompt tokens looked for in the prefix cache",
            self.prefix_queries.clone(),
        );
        r.register(
            "prefix_cache_hit_tokens",
            "Prompt tokens found in the prefix cache",
            self.prefix_hits.clone(),
        );
        r.register(
            "prefill_tokens",
            "Known tokens computed: prompts, and sequences computed again",
            self.prefill_tokens.clone(),
        );
        r.register(
            "decode_tokens",
            "Output tokens made",
            self.decode_tokens.clone(),
        );
        r.register(
            "preemptions",
            "Times a sequence lost its pages to another",
            self.preemptions.clone(),
        );
        r.register(
            "failed_steps",
            "Steps that the backend failed",
            self.failed_steps.clone(),
        );
        r.register_with_unit(
            "step_duration",
            "Time of a step, sampling included",
            Unit::Seconds,
            self.step_time.clone(),
        );
        r.register("step_rows", "Rows of a step", self.step_rows.clone());
        r.register_with_unit(
            "queue_duration",
            "Time from submission to first admission",
            Unit::Seconds,
            self.queue_time.clone(),
        );
        self.drafts.register(r);
    }

    pub(crate) fn set_load(&self, load: &Load) {
        self.running.set(i64::from(load.running));
        self.waiting.set(i64::from(load.waiting));
        self.kv_usage.set(load.kv_usage);
        self.drafts.price(load.draft_price);
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct StepStats {
    pub(crate) time: Duration,
    pub(crate) prefill_rows: usize,
    /// Sum of the positions of the prefill rows.
    pub(crate) prefill_depth: u64,
    pub(crate) decode_rows: usize,
    /// Output tokens made.
    pub(crate) output_tokens: usize,
}

/// Steps whose times the percentiles are taken of.
const WINDOW: usize = 128;
/// Steps from one look at the percentiles to the next.
const REFRESH: u64 = 16;
/// Working time after which a step counts 1/e as much as a new one.
const MEMORY: f64 = 10.0;

/// A rate over recent working time: both sums fade alike, so it is right from the first step.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    tokens: f64,
    seconds: f64,
}

impl Rate {
    fn add(&mut self, tokens: usize, seconds: f64) {
        if tokens == 0 {
            return;
        }
        let fade = (-seconds / MEMORY).exp();
        self.tokens = self.tokens * fade + tokens as f64;
        self.seconds = self.seconds * fade + seconds;
    }

    fn per_second(&self) -> f64 {
        if self.seconds > 0.0 {
            self.tokens / self.seconds
        } else {
            0.0
        }
    }
}

/// Gathers the rates and step times of [`Load`].
#[derive(Debug)]
pub(crate) struct LoadMeter {
    prefill: Rate,
    decode: Rate,
    /// Ring of the last step times, in milliseconds.
    times: Vec<f64>,
    sorted: Vec<f64>,
    steps: u64,
    p50: f64,
    p99: f64,
}

impl LoadMeter {
    pub(crate) fn new() -> Self {
        Self {
            prefill: Rate::default(),
            decode: Rate::default(),
            times: Vec::with_capacity(WINDOW),
            sorted: Vec::with_capacity(WINDOW),
            steps: 0,
            p50: 0.0,
            p99: 0.0,
        }
    }

    /// Counts one step.
    pub(crate) fn add(&mut self, stats: &StepStats) {
        let seconds = stats.time.as_secs_f64();
        self.prefill.add(stats.prefill_rows, seconds);
        self.decode.add(stats.output_tokens, seconds);
        let at = (self.steps % WINDOW as u64) as usize;
        match self.times.get_mut(at) {
            Some(time) => *time = seconds * 1e3,
            None => self.times.push(seconds * 1e3),
        }
        if self.steps < REFRESH || self.steps.is_multiple_of(REFRESH) {
            self.sorted.clear();
            self.sorted.extend_from_slice(&self.times);
            self.sorted.sort_unstable_by(f64::total_cmp);
            let last = self.sorted.len() - 1;
            self.p50 = self.sorted[last / 2];
            self.p99 = self.sorted[last * 99 / 100];
        }
        self.steps += 1;
    }

    /// Fills in what the meter knows.
    pub(crate) fn report(&self, load: &mut Load) {
        load.prefill_tps = self.prefill.per_second();
        load.decode_tps = self.decode.per_second();
        load.step_ms_p50 = self.p50;
        load.step_ms_p99 = self.p99;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_percentiles_of_a_known_series() {
        let mut meter = LoadMeter::new();
        for i in 0..1000u64 {
            meter.add(&StepStats {
                time: Duration::from_millis(if i % 10 == 0 { 50 } else { 10 }),
                prefill_rows: if i % 10 == 0 { 200 } else { 0 },
                prefill_depth: 0,
                decode_rows: 4,
                output_tokens: 4,
            });
        }
        let mut load = Load::default();
        meter.report(&mut load);
        assert!((load.prefill_tps - 4000.0).abs() < 1.0, "{load:?}");
        assert!((load.decode_tps - 4000.0 / 14.0).abs() < 5.0, "{load:?}");
        assert_eq!((load.step_ms_p50, load.step_ms_p99), (10.0, 50.0));
    }

    #[test]
    fn every_metric_is_written_with_its_prefix() {
        let metrics = EngineMetrics::default();
        metrics.set_load(&Load {
            running: 3,
            kv_usage: 0.5,
            ..Load::default()
        });
        let mut registry = Registry::with_prefix("shoal");
        metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(
            text.contains("shoal_engine_running_sequences 3\n"),
            "{text}"
        );
        assert!(text.contains("shoal_engine_kv_usage_ratio 0.5\n"));
        assert!(text.contains("shoal_engine_step_duration_seconds_count 0\n"));
        assert!(text.contains("shoal_engine_prefix_cache_hit_tokens_total 0\n"));
    }
}
