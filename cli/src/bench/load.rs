//! The loops that send requests: closed (a fixed number in flight) or open (a fixed rate).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::prompts::Prompt;
use super::report::{Record, Report};
use super::{BenchError, ServeArgs, grpc, http};

/// A server and how to ask it.
pub(super) enum Target {
    Grpc(Box<grpc::Target>),
    Http(http::Target),
}

struct Load {
    target: Target,
    prompts: Vec<Prompt>,
    timeout: Duration,
    /// The next request that nobody has taken.
    next: AtomicU32,
    /// One past the last.
    end: u32,
}

impl Load {
    async fn one(&self, index: u32) -> Result<Record, BenchError> {
        let prompt = &self.prompts[index as usize % self.prompts.len()];
        let answer = async {
            match &self.target {
                Target::Grpc(target) => target.ask(prompt).await,
                Target::Http(target) => target.ask(prompt).await,
            }
        };
        tokio::time::timeout(self.timeout, answer)
            .await
            .unwrap_or(Err(BenchError::Timeout(self.timeout)))
    }

    fn take(&self) -> Option<u32> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.end).then_some(index)
    }
}

/// Warms up, runs the loop, and sums up.
pub(super) async fn run(
    args: &ServeArgs,
    target: Target,
    prompts: Vec<Prompt>,
) -> Result<Report, BenchError> {
    let load = Arc::new(Load {
        target,
        prompts,
        timeout: args.timeout,
        next: AtomicU32::new(args.warmup),
        end: args.warmup.saturating_add(args.requests),
    });
    for index in 0..args.warmup {
        if let Err(error) = load.one(index).await {
            tracing::warn!(error = crate::chain(&error), "a warm-up request failed");
        }
    }
    let start = Instant::now();
    let results = match args.rate {
        Some(rate) => open(&load, rate, args.seed).await?,
        None => closed(&load, args.concurrency).await?,
    };
    Report::new(results, start.elapsed())
}

async fn closed(
    load: &Arc<Load>,
    concurrency: u32,
) -> Result<Vec<Result<Record, BenchError>>, BenchError> {
    let mut tasks = JoinSet::new();
    for _ in 0..concurrency {
        let load = load.clone();
        tasks.spawn(async move {
            let mut results = Vec::new();
            while let Some(index) = load.take() {
                results.push(load.one(index).await);
            }
            results
        });
    }
    let mut all = Vec::new();
    while let Some(results) = tasks.join_next().await {
        all.extend(results?);
    }
    Ok(all)
}

/// Arrivals of a Poisson process.
async fn open(
    load: &Arc<Load>,
    rate: f64,
    seed: u64,
) -> Result<Vec<Result<Record, BenchError>>, BenchError> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut at = Instant::now();
    let mut tasks = JoinSet::new();
    while let Some(index) = load.take() {
        tokio::time::sleep_until(at).await;
        let load = load.clone();
        tasks.spawn(async move { load.one(index).await });
        let uniform: f64 = random.random();
        at += Duration::from_secs_f64(-(1.0 - uniform).ln() / rate);
    }
    let mut all = Vec::new();
    while let Some(result) = tasks.join_next().await {
        all.push(result?);
    }
    Ok(all)
}
