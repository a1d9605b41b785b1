//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use shoal_gguf::GgmlType;
use shoal_gguf::testmodel::MIN_VOCAB;

use crate::bench;
use crate::chat::ChatArgs;
use crate::config::{
    LogSettings, MembershipSettings, RouterSettings, StoreSettings, TraceSettings, UpSettings,
    WorkerSettings,
};
use crate::corpus::CorpusCommand;
use crate::operate::{DrainArgs, StatusArgs, UndrainArgs};
use crate::store::ModelSource;

const ABOUT: &str = "Serves quantized language models from a cluster, on one machine or many";

const EXAMPLES: &str = "\
Examples:
  shoal up                                    the demo model, a router and a worker, on this machine
  shoal chat                                  talk to it
  shoal status --watch                        see it work
  shoal up --model model.gguf --replicas 2    a model of your own, two workers
  shoal worker --model hf://org/repo/model.gguf --listen 0.0.0.0:9090
  shoal router --workers gpu-0:9090,gpu-1:9090 --listen 0.0.0.0:8080

Every setting is taken from its flag, else its environment variable, else the configuration
file, else its default. The exit status is 0 on success, 1 on an error, 2 on wrong usage.";

/// `shoal`.
#[derive(Parser, Debug)]
#[command(name = "shoal", version, about = ABOUT, after_help = EXAMPLES, propagate_version = true)]
pub(crate) struct Cli {
    /// Configuration file (TOML)
    #[arg(long, global = true, env = "SHOAL_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) log: LogSettings,

    #[command(flatten)]
    pub(crate) trace: TraceSettings,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: a router and workers under one supervisor
    #[command(after_help = "\
Examples:
  shoal up
  shoal up --model model.gguf --replicas 2 --listen 0.0.0.0:8080
  SHOAL_WORKER_THREADS=4 shoal up --config shoal.toml

The router and the workers take their own settings from their environment variables and from the
sections [router] and [worker] of the configuration file.")]
    Up(UpArgs),

    /// Run a router: the OpenAI HTTP API and gRPC before workers
    #[command(after_help = "\
Examples:
  shoal router --workers 127.0.0.1:9090
  shoal router --workers gpu-0:9090,gpu-1:9090 --listen 0.0.0.0:8080 --api-keys keys.toml
  shoal router --membership etcd://etcd-0:2379,etcd-1:2379/production")]
    Router(Box<RouterCommand>),

    /// Run a worker: the engine of one model
    #[command(after_help = "\
Examples:
  shoal worker
  shoal worker --model model.gguf --listen 0.0.0.0:9090 --threads 8 --kv-size 2GiB
  shoal worker --membership etcd://etcd-0:2379/production --listen 0.0.0.0:9090 \\
    --advertise gpu-0:9090 --group blue-0

One model on two machines:
  shoal worker --tensor-parallel 2 --rank-listen 0.0.0.0:7000 --rank-secret secret
  shoal worker --tensor-parallel 2 --rank 1 --join gpu-0:7000 --rank-secret secret")]
    Worker(Box<WorkerCommand>),

    /// Run a rank of a worker's group; its standard input is the line to the worker
    #[command(hide = true)]
    Rank,

    /// Chat with a served model in the terminal
    #[command(after_help = "\
Examples:
  shoal chat
  shoal chat --system 'You answer in one sentence.' --temperature 0.2
  echo 'What is a shoal?' | shoal chat --max-tokens 60

Where standard input is not a terminal, each of its lines is one prompt.")]
    Chat(ChatArgs),

    /// Show a running cluster: routers, groups, load, KV usage
    #[command(after_help = "\
Examples:
  shoal status
  shoal status --watch
  shoal status --json --url http://router-0:8080")]
    Status(StatusArgs),

    /// Have a worker group take no new requests, and wait until it is idle
    #[command(after_help = "\
Examples:
  shoal drain worker-0
  shoal drain blue-0 --deadline 30s")]
    Drain(DrainArgs),

    /// Have a drained worker group take requests again
    Undrain(UndrainArgs),

    /// Load, list and drop the text that drafts
    #[command(subcommand)]
    Corpus(CorpusCommand),

    /// Inspect, fetch and list model files
    #[command(subcommand)]
    Model(ModelCommand),

    /// Measure a served model
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// Options of `shoal up`.
#[derive(Args, Debug)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) settings: UpSettings,

    #[command(flatten)]
    pub(crate) store: StoreSettings,

    /// Print the settings as TOML and end
    #[arg(long)]
    pub(crate) print_config: bool,
}

/// Options of `shoal router`.
#[derive(Args, Debug)]
pub(crate) struct RouterCommand {
    #[command(flatten)]
    pub(crate) settings: RouterSettings,

    #[command(flatten)]
    pub(crate) membership: MembershipSettings,

    /// Print the settings as TOML and end
    #[arg(long)]
    pub(crate) print_config: bool,

    /// Standard input is the line to a supervisor
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

/// Options of `shoal worker`.
#[derive(Args, Debug)]
pub(crate) struct WorkerCommand {
    #[command(flatten)]
    pub(crate) settings: WorkerSettings,

    #[command(flatten)]
    pub(crate) membership: MembershipSettings,

    #[command(flatten)]
    pub(crate) store: StoreSettings,

    /// Print the settings as TOML and end
    #[arg(long)]
    pub(crate) print_config: bool,

    /// Standard input is the line to a supervisor
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

/// What to do with model files.
#[derive(Subcommand, Debug)]
pub(crate) enum ModelCommand {
    /// Show what a model file holds and what memory it needs
    #[command(after_help = "\
Examples:
  shoal model inspect
  shoal model inspect model.gguf --tensors
  shoal model inspect hf://org/repo/model.gguf --json")]
    Inspect(InspectArgs),

    /// Fetch a model into the cache and print its path
    #[command(after_help = "\
Examples:
  shoal model fetch
  shoal model fetch hf://Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q8_0.gguf")]
    Fetch(FetchArgs),

    /// List the cached models
    List(ListArgs),

    /// Write a model of random weights, of any shape: to measure what no file at hand shows
    #[command(after_help = "\
Examples:
  shoal model random llama-1b.gguf
  shoal model random small.gguf --layers 2 --width 256 --heads 4 --kv-heads 2 --ff 512 --vocab 1024")]
    Random(RandomArgs),
}

/// Options of `shoal model random`: by default the shape of Llama 3.2 1B.
#[derive(Args, Debug)]
pub(crate) struct RandomArgs {
    /// File to write
    pub(crate) out: PathBuf,

    /// Type of the matrices
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_K", value_parser = weight_type)]
    pub(crate) weights: GgmlType,

    /// Blocks
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) layers: usize,

    /// Width of a row between the blocks
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(crate) width: usize,

    /// Width inside the feed-forward part
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub(crate) ff: usize,

    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) heads: usize,

    /// Key-value heads
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) kv_heads: usize,

    /// Width of a head
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) head_dim: usize,

    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 128_256,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(MIN_VOCAB as u64..))]
    pub(crate) vocab: usize,

    /// Longest context in tokens
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub(crate) context: u32,
}

fn weight_type(name: &str) -> Result<GgmlType, String> {
    let named = |ty: &GgmlType| ty.name().eq_ignore_ascii_case(name);
    GgmlType::all().find(named).ok_or_else(|| {
        let names: Vec<&str> = GgmlType::all().map(GgmlType::name).collect();
        format!("the types are {}", names.join(", "))
    })
}

/// Options of `shoal model inspect`.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// A GGUF file, hf://ORG/REPO/FILE[@REVISION], or demo
    #[arg(default_value_t)]
    pub(crate) model: ModelSource,

    /// Show every tensor
    #[arg(long)]
    pub(crate) tensors: bool,

    /// Show every metadata entry
    #[arg(long)]
    pub(crate) metadata: bool,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) store: StoreSettings,
}

/// Options of `shoal model fetch`.
#[derive(Args, Debug)]
pub(crate) struct FetchArgs {
    /// hf://ORG/REPO/FILE[@REVISION], or demo
    #[arg(default_value_t)]
    pub(crate) model: ModelSource,

    #[command(flatten)]
    pub(crate) store: StoreSettings,
}

/// Options of `shoal model list`.
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) store: StoreSettings,
}

/// What to measure.
#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Load a server and report throughput and latencies
    #[command(after_help = "\
Examples:
  shoal bench serve --concurrency 32 --requests 256 --ignore-eos
  shoal bench serve --rate 5 --requests 300 --prompts prompts.jsonl
  shoal bench serve --api http --url http://127.0.0.1:8000 --model llama --json

Time to first token: from sending a request to the first text. Time per output token: from the
first text to the last, by the tokens after the first. Tokens are those that the server counts;
tokens/s are those of all answered requests by the time of the whole run.")]
    Serve(bench::ServeArgs),

    /// Time the steps of a model on this machine, beside what the machine can do at most
    #[command(after_help = "\
Examples:
  shoal bench engine
  shoal bench engine model.gguf --threads 1 --only decode
  shoal bench engine --json

Times are medians. read%, dots% and fma%: the time that the weights, keys and values would take to
read, the products of quantised weights to compute, and attention to compute, each at the rate that
the machine was found to have, as a share of the time taken. limit%: the dearest of the three in
every part of a step.")]
    Engine(bench::engine::EngineArgs),
}
