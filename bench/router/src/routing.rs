//! 40 tenants with system prompts of 1,000 tokens over 4 workers whose caches hold 13 prompts
//! each, under the four ways to choose a worker.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;

use crate::{
    Result,
    http::{COMPLETIONS, Exchange, completion},
    paced::{self, Pace, Stamps},
    router::Router,
    stats::percentile_ms,
};

const TENANTS: usize = 40;
const SYSTEM: usize = 1000;
const WORKERS: usize = 4;
const CACHED_PROMPTS: u32 = 13;
/// System prompt, question and answer, in pages of 32 tokens.
const PROMPT_PAGES: u32 = 35;
const PAGE: usize = 32;
const OUTPUT: usize = 32;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Requests under each routing
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// Requests per second
    #[arg(long, default_value_t = 25.0)]
    rate: f64,
    /// Share of the requests that go to one tenant, beside its even share of the rest
    #[arg(long, default_value_t = 0.0)]
    hot: f64,
    /// Only these
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "cost,round-robin,least-load,power-of-two"
    )]
    routings: Vec<String>,
}

struct Request {
    at: Duration,
    tenant: usize,
    prompt: Vec<u32>,
}

struct Answer {
    first: f64,
    prompt: u64,
    cached: u64,
}

/// Poisson arrivals; equal for equal arguments.
fn workload(args: &Args) -> Vec<Request> {
    let mut rng = StdRng::seed_from_u64(7);
    let mut letters =
        |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(97..123)).collect() };
    let systems: Vec<Vec<u32>> = (0..TENANTS).map(|_| letters(SYSTEM)).collect();
    let mut rng = StdRng::seed_from_u64(8);
    let mut at = 0.0;
    let request = |_| {
        at -= rng.random_range(f64::EPSILON..1.0).ln() / args.rate;
        let tenant = match rng.random_bool(args.hot) {
            true => 0,
            false => rng.random_range(0..TENANTS),
        };
        let question = rng.random_range(20..60);
        let question = (0..question).map(|_| rng.random_range(97..123));
        Request {
            at: Duration::from_secs_f64(at),
            tenant,
            prompt: systems[tenant].iter().copied().chain(question).collect(),
        }
    };
    (0..args.requests).map(request).collect()
}

/// The share of prompt tokens that one cache for all would have given.
fn oracle(workload: &[Request]) -> f64 {
    let mut seen = HashSet::new();
    let hits = workload
        .iter()
        .filter(|request| !seen.insert(request.tenant))
        .count();
    let tokens: usize = workload.iter().map(|request| request.prompt.len()).sum();
    (hits * (SYSTEM / PAGE) * PAGE) as f64 / tokens as f64
}

pub(crate) async fn run(shoal: &Path, args: &Args) -> Result<()> {
    let workload = workload(args);
    let oracle = oracle(&workload);
    println!("| routing | prefix hits | of the oracle's | TTFT p50 | TTFT p99 | busiest / mean |");
    println!("|---|---|---|---|---|---|");
    for routing in &args.routings {
        let pace = Pace {
            step: Duration::from_millis(4),
            prefill_row: Duration::from_micros(100),
            decode_row: Duration::from_micros(100),
            pages: CACHED_PROMPTS * PROMPT_PAGES,
            max_running: 128,
        };
        let workers = paced::workers(WORKERS, pace, &Stamps::new(0, 0)).await?;
        let router = Router::start(
            shoal,
            workers.iter().map(|w| w.address),
            &["--routing", routing],
        )
        .await?;
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for request in &workload {
            let body = completion(&request.prompt, OUTPUT, true);
            let (due, address) = (start + request.at, router.address);
            tokio::time::sleep_until(due.into()).await;
            tasks.spawn(async move { ask(address, &body).await });
        }
        let mut answers = Vec::new();
        while let Some(answer) = tasks.join_next().await {
            answers.push(answer??);
        }
        let busy: Vec<f64> = workers.iter().map(paced::PacedWorker::busy).collect();
        let mean = busy.iter().sum::<f64>() / WORKERS as f64;
        let busiest = busy.iter().copied().fold(0.0, f64::max);
        let prompt: u64 = answers.iter().map(|a| a.prompt).sum();
        let cached: u64 = answers.iter().map(|a| a.cached).sum();
        let hits = cached as f64 / prompt as f64;
        let mut first: Vec<f64> = answers.iter().map(|a| a.first).collect();
        println!(
            "| {routing} | {:.1} % | {:.1} % | {:.1} ms | {:.1} ms | {:.2} |",
            100.0 * hits,
            100.0 * hits / oracle,
            percentile_ms(&mut first, 50.0),
            percentile_ms(&mut first, 99.0),
            busiest / mean,
        );
    }
    Ok(())
}

async fn ask(address: std::net::SocketAddr, body: &str) -> Result<Answer> {
    let start = Instant::now();
    let mut exchange = Exchange::post(address, COMPLETIONS, body).await?;
    exchange.more().await?;
    let first = start.elapsed().as_secs_f64();
    exchange.finish().await?;
    if exchange.status() != 200 || !exchange.has("[DONE]") {
        return Err(String::from_utf8_lossy(&exchange.bytes).into_owned().into());
    }
    let number = |name| exchange.number(name).ok_or("the answer has no usage");
    Ok(Answer {
        first,
        prompt: number("\"prompt_tokens\"")?,
        cached: number("\"cached_tokens\"")?,
    })
}
