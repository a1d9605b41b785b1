//! What the router adds to a token: from its making at the worker to its arrival at the
//! client, less the same without the router.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use shoal_proto::worker::{
    RouterFrame, Sampling, Stopping, Submit, router_frame, worker_client::WorkerClient,
    worker_frame::Frame,
};
use tokio::task::JoinSet;

use crate::{
    Result,
    http::{COMPLETIONS, Exchange, completion},
    http2::{self, Connections},
    paced::{self, BYTES, MARK, Pace, PacedWorker, Stamps},
    peer,
    router::Router,
    stats::percentile_ms,
};

/// For the start of the streams, before anything is measured.
const WARM_UP: Duration = Duration::from_secs(4);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Streams at one time
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// Workers that they are spread over; each makes the tokens of all its streams at once
    #[arg(long, default_value_t = 50)]
    workers: usize,
    /// Tokens a second of each stream
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// Connections that the streams share over HTTP/2
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Python with sglang-router installed, to measure it in front of an HTTP worker of the
    /// same pace
    #[arg(long)]
    sglang: Option<PathBuf>,
}

/// Ages of tokens at their arrival.
#[derive(Debug, Default)]
pub(crate) struct Ages {
    measuring: AtomicBool,
    ages: Mutex<Vec<f64>>,
}

impl Ages {
    fn add(&self, ages: impl Iterator<Item = f64>) {
        if self.measuring.load(Ordering::Relaxed) {
            let mut all = self.ages.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(ages);
        }
    }

    fn take(&self) -> Vec<f64> {
        std::mem::take(&mut self.ages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One measured way.
struct Measured {
    ages: Vec<f64>,
    seconds: f64,
    cpu: f64,
}

/// Waits for the streams to run, then measures for a while.
async fn measure(ages: &Ages, seconds: u64, router: Option<&Router>) -> Result<Measured> {
    let cpu = || router.map_or(Ok(0.0), Router::cpu);
    tokio::time::sleep(WARM_UP).await;
    let (start, before) = (Instant::now(), cpu()?);
    ages.measuring.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    ages.measuring.store(false, Ordering::Relaxed);
    Ok(Measured {
        seconds: start.elapsed().as_secs_f64(),
        cpu: cpu()? - before,
        ages: ages.take(),
    })
}

pub(crate) async fn run(shoal: &Path, args: &Args) -> Result<()> {
    let interval = Duration::from_secs_f64(1.0 / args.rate);
    let tokens = ((args.seconds + 10) as f64 * args.rate) as usize;
    let stamps = Stamps::new(args.streams, tokens);
    let pace = Pace {
        step: interval,
        prefill_row: Duration::ZERO,
        decode_row: Duration::ZERO,
        pages: (args.streams.div_ceil(args.workers) * 2 * tokens.div_ceil(32)) as u32,
        max_running: args.streams,
    };
    println!(
        "| {} streams at {} tokens/s | p50 | p99 | tokens/s | tokens/s per core of the router |",
        args.streams, args.rate
    );
    println!("|---|---|---|---|---|");
    let workers = paced::workers(args.workers, pace, &stamps).await?;
    let mut direct = direct(args, &workers, &stamps).await?;
    direct.print("worker alone");
    drop(workers);

    let workers = paced::workers(args.workers, pace, &stamps).await?;
    let addresses = workers.iter().map(|w| w.address);
    let limit = args.streams.to_string();
    let router = Router::start(shoal, addresses, &["--max-running", &limit]).await?;
    let prompt = |stream| json!([BYTES + stream as u32]);
    let mut routed = through(args, &router, &stamps, prompt).await?;
    routed.print("through shoal router");
    println!(
        "| added | {:.2} ms | {:.2} ms | | |",
        routed.percentile(50.0) - direct.percentile(50.0),
        routed.percentile(99.0) - direct.percentile(99.0)
    );
    through_few(args, &router, &stamps, prompt)
        .await?
        .print("through shoal router, HTTP/2");
    drop((router, workers));
    if let Some(python) = &args.sglang {
        let address = peer::http_worker(stamps.clone(), interval).await?;
        let router = peer::sglang_router(python, address).await?;
        let prompt = |stream| json!(format!("~{stream};"));
        through(args, &router, &stamps, prompt)
            .await?
            .print("through sglang-router");
        through_few(args, &router, &stamps, prompt)
            .await?
            .print("through sglang-router, HTTP/2");
    }
    Ok(())
}

impl Measured {
    fn percentile(&mut self, p: f64) -> f64 {
        percentile_ms(&mut self.ages, p)
    }

    fn print(&mut self, name: &str) {
        let tokens = self.ages.len() as f64;
        let per_core = match self.cpu {
            0.0 => String::new(),
            cpu => format!("{:.0}", tokens / cpu),
        };
        println!(
            "| {name} | {:.2} ms | {:.2} ms | {:.0} | {per_core} |",
            self.percentile(50.0),
            self.percentile(99.0),
            tokens / self.seconds
        );
    }
}

/// Streams through a router, on a connection each.
async fn through(
    args: &Args,
    router: &Router,
    stamps: &Arc<Stamps>,
    prompt: impl Fn(usize) -> Value,
) -> Result<Measured> {
    let to = router.address;
    let read = |mut reader: Reader| {
        let body = completion(prompt(reader.stream), stamps.tokens(), true);
        async move {
            let mut exchange = Exchange::post(to, COMPLETIONS, &body).await?;
            loop {
                exchange.bytes.clear();
                match exchange.more().await? {
                    [] => return Ok(reader.first),
                    news => reader.take(news),
                }
            }
        }
    };
    streams(args, router, stamps, read).await
}

/// Streams through a router, on few connections.
async fn through_few(
    args: &Args,
    router: &Router,
    stamps: &Arc<Stamps>,
    prompt: impl Fn(usize) -> Value,
) -> Result<Measured> {
    let connections = Connections::open(router.address, args.connections).await?;
    let read = |mut reader: Reader| {
        let body = completion(prompt(reader.stream), stamps.tokens(), true);
        let connection = connections.of(reader.stream);
        async move {
            let mut answer = http2::post(connection, COMPLETIONS, body).await?;
            while let Some(news) = answer.data().await {
                let news = news?;
                answer.flow_control().release_capacity(news.len())?;
                reader.take(&news);
            }
            Ok(reader.first)
        }
    };
    streams(args, router, stamps, read).await
}

/// What has come of one stream.
struct Reader {
    stream: usize,
    seen: usize,
    /// What came first, should it end too early.
    first: String,
    stamps: Arc<Stamps>,
    ages: Arc<Ages>,
}

impl Reader {
    fn take(&mut self, news: &[u8]) {
        if self.first.is_empty() {
            self.first = String::from_utf8_lossy(news).into_owned();
        }
        let tokens = news.iter().filter(|&&byte| byte == MARK).count();
        let tokens = self.seen..self.seen + tokens;
        self.seen = tokens.end;
        let (stream, stamps) = (self.stream, &self.stamps);
        self.ages
            .add(tokens.filter_map(|token| stamps.age(stream, token)));
    }
}

/// Measures streams, each read by what `read` gives, which ends with what came first.
async fn streams<R>(
    args: &Args,
    router: &Router,
    stamps: &Arc<Stamps>,
    read: impl Fn(Reader) -> R,
) -> Result<Measured>
where
    R: Future<Output = Result<String>> + Send + 'static,
{
    let ages = Arc::new(Ages::default());
    let mut tasks = JoinSet::new();
    for stream in 0..args.streams {
        tasks.spawn(read(Reader {
            stream,
            seen: 0,
            first: String::new(),
            stamps: stamps.clone(),
            ages: ages.clone(),
        }));
    }
    let measured = tokio::select! {
        measured = measure(&ages, args.seconds, Some(router)) => measured?,
        Some(ended) = tasks.join_next() => {
            return Err(format!("a stream ended early: {}", ended??).into());
        }
    };
    tasks.shutdown().await;
    Ok(measured)
}

/// Streams over the workers' own protocol: one session for each worker.
async fn direct(args: &Args, workers: &[PacedWorker], stamps: &Arc<Stamps>) -> Result<Measured> {
    let ages = Arc::new(Ages::default());
    let mut tasks = JoinSet::new();
    for (i, worker) in workers.iter().enumerate() {
        let streams = (i..args.streams).step_by(args.workers).collect();
        tasks.spawn(session(
            worker.address,
            streams,
            stamps.clone(),
            ages.clone(),
        ));
    }
    let measured = tokio::select! {
        measured = measure(&ages, args.seconds, None) => measured?,
        Some(ended) = tasks.join_next() => {
            ended??;
            return Err("a session ended early".into());
        }
    };
    tasks.shutdown().await;
    Ok(measured)
}

async fn session(
    address: SocketAddr,
    streams: Vec<usize>,
    stamps: Arc<Stamps>,
    ages: Arc<Ages>,
) -> Result<()> {
    let max_tokens = stamps.tokens() as u32;
    let submissions = async_stream::stream! {
        for stream in streams {
            yield RouterFrame {
                frame: Some(router_frame::Frame::Submit(submit(stream, max_tokens))),
            };
        }
        // The end of this stream would be the end of the session.
        std::future::pending::<()>().await;
    };
    let mut client = WorkerClient::connect(format!("http://{address}")).await?;
    let mut frames = client.session(submissions).await?.into_inner();
    while let Some(frame) = frames.message().await? {
        let Some(Frame::Step(step)) = frame.frame else {
            continue;
        };
        for output in &step.sequences {
            let first = output.output_offset as usize;
            let tokens = first..first + output.tokens.len();
            let stream = output.sequence as usize;
            ages.add(tokens.filter_map(|token| stamps.age(stream, token)));
        }
    }
    Ok(())
}

fn submit(stream: usize, max_tokens: u32) -> Submit {
    Submit {
        sequence: stream as u64,
        prompt: vec![BYTES + stream as u32],
        sampling: Some(Sampling {
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..Sampling::default()
        }),
        stopping: Some(Stopping {
            max_tokens,
            ..Stopping::default()
        }),
        cache_namespace: vec![0; 16],
        ..Submit::default()
    }
}
