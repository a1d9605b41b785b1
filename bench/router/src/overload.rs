//! Ten times as many requests as the workers can take, whatever becomes of them.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use crate::{
    Result,
    http::{COMPLETIONS, Exchange, completion},
    paced::{self, Pace, Stamps},
    router::Router,
    stats::percentile_ms,
};

const WORKERS: usize = 4;
const ROWS: usize = 16;
const OUTPUT: usize = 16;
const PROMPT: usize = 64;
/// After the start of the flood; the queue is full by then.
const SETTLE: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds of overload
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Requests per second, as a multiple of what the workers can take
    #[arg(long, default_value_t = 10.0)]
    factor: f64,
}

/// One answer: its status, when it came, how long it took, and whether it said when to retry.
struct Answer {
    status: u16,
    at: Instant,
    seconds: f64,
    retry_after: bool,
}

async fn ask(address: SocketAddr, body: Arc<str>) -> Result<Answer> {
    let start = Instant::now();
    let mut exchange = Exchange::post(address, COMPLETIONS, &body).await?;
    exchange.finish().await?;
    Ok(Answer {
        status: exchange.status(),
        at: Instant::now(),
        seconds: start.elapsed().as_secs_f64(),
        retry_after: exchange.has("retry-after: "),
    })
}

/// Requests per second that are answered when there are always enough.
async fn capacity(address: SocketAddr, body: &Arc<str>) -> Result<f64> {
    let (done, stop) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut tasks = JoinSet::new();
    for _ in 0..2 * WORKERS * ROWS {
        let (body, done, stop) = (body.clone(), done.clone(), stop.clone());
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                ask(address, body.clone()).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        });
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (before, start) = (done.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(Duration::from_secs(8)).await;
    let rate = (done.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    while let Some(task) = tasks.join_next().await {
        task??;
    }
    Ok(rate)
}

pub(crate) async fn run(shoal: &Path, args: &Args) -> Result<()> {
    let pace = Pace {
        step: Duration::from_millis(25),
        prefill_row: Duration::from_micros(10),
        decode_row: Duration::from_micros(10),
        pages: 2048,
        max_running: ROWS,
    };
    let workers = paced::workers(WORKERS, pace, &Stamps::new(0, 0)).await?;
    let running = (WORKERS * ROWS).to_string();
    let flags = ["--max-running", &running];
    let router = Router::start(shoal, workers.iter().map(|w| w.address), &flags).await?;
    let body: Arc<str> = completion(vec![97; PROMPT], OUTPUT, false).into();
    let capacity = capacity(router.address, &body).await?;

    let rate = args.factor * capacity;
    let start = Instant::now();
    let length = Duration::from_secs(args.seconds);
    let mut tasks = JoinSet::new();
    let mut memory = Vec::new();
    let mut sent = 0;
    while start.elapsed() < length {
        let due = start + Duration::from_secs_f64(f64::from(sent) / rate);
        tokio::time::sleep_until(due.into()).await;
        tasks.spawn(ask(router.address, body.clone()));
        sent += 1;
        if sent % (rate as u32).max(1) == 0 {
            memory.push((start.elapsed(), router.memory()?));
        }
    }
    let mut answers = Vec::new();
    let mut broken = 0;
    while let Some(answer) = tasks.join_next().await {
        match answer? {
            Ok(answer) => answers.push(answer),
            Err(_) => broken += 1,
        }
    }
    let window = (length - SETTLE).as_secs_f64();
    let in_window = |a: &&Answer| a.at >= start + SETTLE && a.at < start + length;
    let good = answers
        .iter()
        .filter(|a| a.status == 200)
        .filter(in_window)
        .count();
    let refused: Vec<&Answer> = answers.iter().filter(|a| a.status == 429).collect();
    let other = answers
        .iter()
        .filter(|a| !matches!(a.status, 200 | 429))
        .count();
    let silent = refused.iter().filter(|a| !a.retry_after).count();
    let mut times: Vec<f64> = refused.iter().map(|a| a.seconds).collect();
    let at = |time: Duration| {
        memory
            .iter()
            .find(|(t, _)| *t >= time)
            .map_or(0.0, |(_, m)| *m)
    };
    println!("| overload | |");
    println!("|---|---|");
    println!("| capacity | {capacity:.0} requests/s |");
    println!(
        "| offered | {:.0} requests/s for {} s |",
        f64::from(sent) / length.as_secs_f64(),
        args.seconds
    );
    println!(
        "| goodput | {:.1} % of capacity |",
        100.0 * good as f64 / window / capacity
    );
    println!(
        "| refused with 429 | {} ({silent} without Retry-After) |",
        refused.len()
    );
    println!("| other answers | {other} (and {broken} broken connections) |");
    println!(
        "| refusal p50 / p99 | {:.1} / {:.1} ms |",
        percentile_ms(&mut times, 50.0),
        percentile_ms(&mut times, 99.0)
    );
    println!(
        "| router memory at {} s, at the end | {:.0}, {:.0} MiB |",
        SETTLE.as_secs(),
        at(SETTLE),
        memory.last().map_or(0.0, |(_, m)| *m)
    );
    Ok(())
}
