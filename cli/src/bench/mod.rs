//! `shoal bench`: load for a served model, and what it made of it; the engine alone.

pub(crate) mod engine;
mod grpc;
mod http;
mod load;
mod prompts;
mod report;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use shoal_core::Class;

use crate::client::{ClientArgs, ClientError};

pub(crate) use report::Report;

/// Options of `shoal bench serve`.
#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// How to ask
    #[arg(long, value_enum, default_value_t = Api::Grpc)]
    api: Api,

    /// Model to ask; needed only where the server serves several
    #[arg(long, value_name = "NAME", default_value = "")]
    model: String,

    /// Prompts, one JSON object a line: {"messages": [...]} or {"prompt": "..."}; used in order,
    /// wrapping round [default: a few short questions]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Requests in flight at one time (closed loop)
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: u32,

    /// Requests a second, at random times, however many are in flight (open loop)
    #[arg(long, value_name = "R", conflicts_with = "concurrency", value_parser = rate)]
    rate: Option<f64>,

    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,

    /// Requests sent one by one before the clock starts
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,

    /// Longest answer in tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: u32,

    /// Go on past the end of the text, so that every answer is as long as it may be
    #[arg(long)]
    ignore_eos: bool,

    /// Randomness of the answers
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,

    /// Seed of the answers, and of the times of an open loop
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,

    /// Longest time that a request may take
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The API that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Api {
    /// shoal.inference.v1
    Grpc,
    /// OpenAI's HTTP API with server-sent events, of any server that has it
    Http,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("a rate is a number above 0".to_owned()),
    }
}

/// Why there is nothing to report, or why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot read the prompts of {path}")]
    Prompts { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: not a prompt")]
    Prompt {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },
    #[error("{path} holds no prompts")]
    NoPrompts { path: PathBuf },
    #[error("{url:?} is no http:// address, which this API needs")]
    Url { url: String },
    #[error("cannot connect to {address}")]
    Connect { address: String, source: io::Error },
    #[error("the request failed")]
    Http(#[from] hyper::Error),
    #[error("the request cannot be put together")]
    Request(#[from] hyper::http::Error),
    #[error("the server answered HTTP {status}: {body}")]
    Status { status: u16, body: String },
    #[error("the server sent an event that is not understood")]
    Event(#[from] serde_json::Error),
    #[error("the server sent an error: {0}")]
    InBand(String),
    #[error("the server sent a line longer than {0} bytes")]
    Line(usize),
    #[error("the request failed")]
    Grpc(#[source] Box<tonic::Status>),
    #[error("no text came")]
    Silent,
    #[error("no answer after {0:?}")]
    Timeout(Duration),
    #[error("a task failed")]
    Task(#[from] tokio::task::JoinError),
    #[error("every request failed; the first so")]
    AllFailed(#[source] Box<BenchError>),
}

impl BenchError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Client(error) => error.class(),
            Self::Grpc(status) => crate::client::status_class(status),
            Self::AllFailed(error) => error.class(),
            Self::Connect { .. } | Self::Http(_) | Self::Timeout(_) => Class::Retry,
            Self::Status { status: 429, .. } => Class::Backpressure,
            Self::Status { status: 500.., .. } => Class::Retry,
            Self::Prompts { .. }
            | Self::Prompt { .. }
            | Self::NoPrompts { .. }
            | Self::Url { .. }
            | Self::Request(_)
            | Self::Status { .. } => Class::Client,
            Self::Event(_) | Self::InBand(_) | Self::Line(_) | Self::Silent | Self::Task(_) => {
                Class::Fatal
            }
        }
    }
}

/// Loads the server and reports.
pub(crate) async fn serve(args: &ServeArgs) -> Result<Report, BenchError> {
    let prompts = match &args.prompts {
        Some(path) => prompts::read(path)?,
        None => prompts::builtin(),
    };
    let target = match args.api {
        Api::Grpc => load::Target::Grpc(Box::new(grpc::Target::connect(args).await?)),
        Api::Http => load::Target::Http(http::Target::new(args)?),
    };
    load::run(args, target, prompts).await
}
