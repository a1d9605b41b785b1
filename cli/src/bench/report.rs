//! What a benchmark measured.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::BenchError;

/// Times one request while its answer streams in.
pub(super) struct Stopwatch {
    start: Instant,
    /// The first and the last event that carried text.
    text: Option<(Instant, Instant)>,
    events: u32,
}

/// Token counts as the server gives them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) prompt: u32,
    pub(super) completion: u32,
    pub(super) cached: u32,
}

/// One answered request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    /// From sending the request to the first text.
    ttft: Duration,
    /// From the first text to the last, by token after the first.
    tpot: Option<Duration>,
    latency: Duration,
    tokens: u32,
    prompt: u32,
    cached: u32,
}

impl Stopwatch {
    pub(super) fn start() -> Self {
        Self {
            start: Instant::now(),
            text: None,
            events: 0,
        }
    }

    /// An event with text came.
    pub(super) fn text(&mut self, now: Instant) {
        let first = self.text.map_or(now, |(first, _)| first);
        self.text = Some((first, now));
        self.events += 1;
    }

    /// The stream ended. Without counts from the server, each event counts as a token.
    pub(super) fn finish(self, now: Instant, counts: Option<Counts>) -> Result<Record, BenchError> {
        let (first, last) = self.text.ok_or(BenchError::Silent)?;
        let counts = counts.unwrap_or_default();
        let tokens = match counts.completion {
            0 => self.events,
            tokens => tokens,
        };
        Ok(Record {
            ttft: first - self.start,
            tpot: (tokens > 1).then(|| (last - first) / (tokens - 1)),
            latency: now - self.start,
            tokens,
            prompt: counts.prompt,
            cached: counts.cached,
        })
    }
}

/// The whole run. Times are in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Report {
    requests: usize,
    errors: usize,
    first_error: Option<String>,
    wall_s: f64,
    output_tokens: u64,
    output_tok_s: f64,
    req_s: f64,
    ttft_ms_p50: Option<f64>,
    ttft_ms_p99: Option<f64>,
    tpot_ms_p50: Option<f64>,
    tpot_ms_p99: Option<f64>,
    latency_ms_p50: Option<f64>,
    latency_ms_p99: Option<f64>,
    prompt_tokens_mean: Option<f64>,
    cached_tokens_mean: Option<f64>,
}

impl Report {
    /// Sums up; an error where no request was answered at all.
    pub(super) fn new(
        results: Vec<Result<Record, BenchError>>,
        wall: Duration,
    ) -> Result<Self, BenchError> {
        let requests = results.len();
        let (mut records, mut first_error) = (Vec::new(), None);
        for result in results {
            match result {
                Ok(record) => records.push(record),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        let errors = requests - records.len();
        let first_error = match first_error {
            Some(error) if records.is_empty() => {
                return Err(BenchError::AllFailed(Box::new(error)));
            }
            error => error.map(|error| crate::chain(&error)),
        };
        let wall = wall.as_secs_f64();
        let tokens: u64 = records.iter().map(|r| u64::from(r.tokens)).sum();
        let times = |of: fn(&Record) -> Option<Duration>| {
            let mut times: Vec<f64> = records
                .iter()
                .filter_map(|r| Some(of(r)?.as_secs_f64() * 1e3))
                .collect();
            times.sort_by(f64::total_cmp);
            times
        };
        let ttft = times(|r| Some(r.ttft));
        let tpot = times(|r| r.tpot);
        let latency = times(|r| Some(r.latency));
        let mean = |of: fn(&Record) -> u32| {
            let sum: u64 = records.iter().map(|r| u64::from(of(r))).sum();
            (!records.is_empty()).then(|| sum as f64 / records.len() as f64)
        };
        Ok(Self {
            requests,
            errors,
            first_error,
            wall_s: wall,
            output_tokens: tokens,
            output_tok_s: tokens as f64 / wall,
            req_s: records.len() as f64 / wall,
            ttft_ms_p50: percentile(&ttft, 50.0),
            ttft_ms_p99: percentile(&ttft, 99.0),
            tpot_ms_p50: percentile(&tpot, 50.0),
            tpot_ms_p99: percentile(&tpot, 99.0),
            latency_ms_p50: percentile(&latency, 50.0),
            latency_ms_p99: percentile(&latency, 99.0),
            prompt_tokens_mean: mean(|r| r.prompt),
            cached_tokens_mean: mean(|r| r.cached),
        })
    }
}

/// The `p`-th percentile of sorted values, with linear interpolation.
fn percentile(sorted: &[f64], p: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let rank = last as f64 * p / 100.0;
    let low = rank.floor() as usize;
    let high = (low + 1).min(last);
    Some(sorted[low] + (sorted[high] - sorted[low]) * (rank - low as f64))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1}"));
        let row = |f: &mut fmt::Formatter<'_>, name, p50, p99| {
            writeln!(f, "{name:<22} {:>10} {:>10}", ms(p50), ms(p99))
        };
        let answered = self.requests - self.errors;
        writeln!(
            f,
            "{:<22} {answered:>10} in {:.2} s",
            "requests answered", self.wall_s
        )?;
        writeln!(f, "{:<22} {:>10}", "requests failed", self.errors)?;
        if let Some(error) = &self.first_error {
            writeln!(f, "  the first: {error}")?;
        }
        writeln!(f, "{:<22} {:>10.1}", "output tokens/s", self.output_tok_s)?;
        writeln!(f, "{:<22} {:>10.2}", "requests/s", self.req_s)?;
        if let (Some(prompt), Some(cached)) = (self.prompt_tokens_mean, self.cached_tokens_mean) {
            writeln!(
                f,
                "{:<22} {prompt:>10.1}, {cached:.1} of them cached",
                "prompt tokens"
            )?;
        }
        writeln!(f, "{:<22} {:>10} {:>10}", "ms", "p50", "p99")?;
        row(f, "time to first token", self.ttft_ms_p50, self.ttft_ms_p99)?;
        row(
            f,
            "time per output token",
            self.tpot_ms_p50,
            self.tpot_ms_p99,
        )?;
        row(f, "whole request", self.latency_ms_p50, self.latency_ms_p99)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_timed_by_its_text() {
        let mut watch = Stopwatch::start();
        let start = watch.start;
        let at = |ms| start + Duration::from_millis(ms);
        for ms in [100, 130, 200] {
            watch.text(at(ms));
        }
        let counts = Counts {
            prompt: 7,
            completion: 11,
            cached: 3,
        };
        let record = watch.finish(at(250), Some(counts)).unwrap();
        assert_eq!(record.ttft, Duration::from_millis(100));
        assert_eq!(record.tpot, Some(Duration::from_millis(10)));
        assert_eq!(record.latency, Duration::from_millis(250));
    }

    #[test]
    fn events_count_where_the_server_does_not() {
        let mut watch = Stopwatch::start();
        let start = watch.start;
        watch.text(start + Duration::from_millis(1));
        watch.text(start + Duration::from_millis(5));
        let record = watch
            .finish(start + Duration::from_millis(6), None)
            .unwrap();
        assert_eq!(
            (record.tokens, record.tpot),
            (2, Some(Duration::from_millis(4)))
        );
        assert!(Stopwatch::start().finish(Instant::now(), None).is_err());
    }

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(percentile(&[], 50.0), None);
        assert_eq!(percentile(&[3.0], 99.0), Some(3.0));
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0], 50.0), Some(2.5));
        let many: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(percentile(&many, 99.0), Some(99.0));
    }

    #[test]
    fn failures_are_counted_and_all_of_them_are_an_error() {
        let record = || {
            let mut watch = Stopwatch::start();
            let end = watch.start + Duration::from_secs(1);
            watch.text(watch.start);
            watch.finish(end, None)
        };
        let results = vec![record(), Err(BenchError::Silent)];
        let report = Report::new(results, Duration::from_secs(2)).unwrap();
        assert_eq!((report.requests, report.errors), (2, 1));
        assert_eq!(report.output_tok_s, 0.5);
        assert!(report.to_string().contains("no text came"));
        let error = Report::new(vec![Err(BenchError::Silent)], Duration::from_secs(1));
        assert!(matches!(error, Err(BenchError::AllFailed(_))));
    }
}
