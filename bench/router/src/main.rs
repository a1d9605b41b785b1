//! Measures the router against workers whose model only takes time: real service, scheduler
//! and prefix cache, with a backend that sleeps; and the index of text that drafts. Prints Markdown
//! tables.

mod http;
mod http2;
mod index;
mod overhead;
mod overload;
mod paced;
mod peer;
mod requests;
mod router;
mod routing;
mod stats;

use std::{error::Error, path::PathBuf};

use clap::{Parser, Subcommand};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Debug, Parser)]
#[command(about, max_term_width = 100)]
struct Args {
    /// The binary whose router is measured
    #[arg(long, default_value = "target/release/shoal")]
    shoal: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Many tenants with long system prompts over few workers with small caches
    Routing(routing::Args),
    /// Ten times as many requests as the workers can take
    Overload(overload::Args),
    /// What the router adds to each token
    Overhead(overhead::Args),
    /// How many requests the router takes
    Requests(requests::Args),
    /// Text that drafts: taking it in and finding it
    Index(index::Args),
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    match args.what {
        What::Routing(a) => routing::run(&args.shoal, &a).await,
        What::Overload(a) => overload::run(&args.shoal, &a).await,
        What::Overhead(a) => overhead::run(&args.shoal, &a).await,
        What::Requests(a) => requests::run(&args.shoal, &a).await,
        What::Index(a) => index::run(&a),
    }
}
