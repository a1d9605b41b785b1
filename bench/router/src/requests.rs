//! How many requests a router takes: short answers in a closed loop, by the time of its own that
//! each costs.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use crate::{
    Result,
    http::{COMPLETIONS, Exchange, completion},
    paced::{self, Pace, Stamps},
    peer,
    router::Router,
};

const WARM_UP: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Requests at one time, each on a connection of its own
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Characters, each a token, of a prompt
    #[arg(long, default_value_t = 200)]
    prompt: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 8)]
    tokens: usize,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Python with sglang-router installed, to measure it in front of an HTTP worker that answers
    /// at once
    #[arg(long)]
    sglang: Option<PathBuf>,
}

pub(crate) async fn run(shoal: &Path, args: &Args) -> Result<()> {
    let pace = Pace {
        step: Duration::ZERO,
        prefill_row: Duration::ZERO,
        decode_row: Duration::ZERO,
        pages: 4096,
        max_running: args.clients,
    };
    let stamps = Stamps::new(1, args.tokens);
    println!(
        "| {} clients | requests/s | of a core of the router |",
        args.clients
    );
    println!("|---|---|---|");
    let workers = paced::workers(1, pace, &stamps).await?;
    let router = Router::start(shoal, workers.iter().map(|w| w.address), &[]).await?;
    measure("Shoal", args, &router).await?;
    drop((router, workers));
    if let Some(python) = &args.sglang {
        let address = peer::http_worker(stamps, Duration::ZERO).await?;
        let router = peer::sglang_router(python, address).await?;
        measure("sglang-router", args, &router).await?;
    }
    Ok(())
}

async fn measure(name: &str, args: &Args, router: &Router) -> Result<()> {
    let done = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for client in 0..args.clients {
        clients.spawn(ask(
            router.address,
            client,
            args.prompt,
            args.tokens,
            done.clone(),
        ));
    }
    let measured = async {
        tokio::time::sleep(WARM_UP).await;
        let (start, before, cpu) = (Instant::now(), done.load(Ordering::Relaxed), router.cpu()?);
        tokio::time::sleep(Duration::from_secs(args.seconds)).await;
        let requests = (done.load(Ordering::Relaxed) - before) as f64;
        let seconds = start.elapsed().as_secs_f64();
        Result::Ok((requests / seconds, requests / (router.cpu()? - cpu)))
    };
    tokio::select! {
        measured = measured => {
            let (rate, of_core) = measured?;
            println!("| {name} | {rate:.0} | {of_core:.0} |");
            Ok(())
        }
        Some(ended) = clients.join_next() => {
            ended??;
            Err("a client ended".into())
        }
    }
}

/// One request after the other, until one fails.
async fn ask(
    to: SocketAddr,
    client: usize,
    prompt: usize,
    tokens: usize,
    done: Arc<AtomicU64>,
) -> Result<()> {
    for number in 0u64.. {
        // No two alike.
        let mut text = format!("{client} {number} ");
        text.extend(std::iter::repeat_n('a', prompt.saturating_sub(text.len())));
        let body = completion(text, tokens, false);
        let mut exchange = Exchange::post(to, COMPLETIONS, &body).await?;
        exchange.finish().await?;
        if exchange.status() != 200 {
            let answer = String::from_utf8_lossy(&exchange.bytes);
            return Err(format!("an answer is {answer}").into());
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
