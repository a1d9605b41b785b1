//! `shoal`: every role of a Shoal cluster in one binary, and the tools around it.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod client;
mod config;
mod error;
mod inspect;
mod model;
mod store;

use std::process::ExitCode;

use clap::Parser;
use shoal_core::Class;

use args::{BenchCommand, Cli, Command, ModelCommand};
use config::{ConfigFile, LogSettings};
use error::CliError;

pub(crate) use error::chain;

/// The exit status for wrong usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            if matches!(error.class(), Class::Retry | Class::Backpressure) {
                eprintln!("hint: this may pass; try again");
            }
            match error {
                CliError::Config(_) => ExitCode::from(USAGE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    let file = match &cli.config {
        Some(path) => ConfigFile::load(path)?,
        None => ConfigFile::default(),
    };
    let log = file.merge(&cli.log)?;
    match cli.command {
        Command::Chat(args) => {
            start_log(log, "warn")?;
            block_on(chat::run(args))?;
        }
        Command::Bench(BenchCommand::Serve(args)) => {
            start_log(log, "warn")?;
            let report = block_on(bench::serve(&args))?;
            model::print(|out| match args.json {
                true => writeln!(out, "{}", serde_json::to_string(&report)?),
                false => write!(out, "{report}"),
            })?;
        }
        Command::Model(command) => {
            start_log(log, "info")?;
            match command {
                ModelCommand::Inspect(args) => model::show(&args, &file)?,
                ModelCommand::Fetch(args) => model::fetch(&args, &file)?,
                ModelCommand::List(args) => model::list(&args, &file)?,
            }
        }
    }
    Ok(())
}

fn start_log(settings: LogSettings, default: &str) -> Result<(), CliError> {
    Ok(shoal_fabric::telemetry::init(&settings.config(default)?)?)
}

/// Runs `task` to its end. A read of standard input that is still under way then is left behind.
fn block_on<T, E>(task: impl Future<Output = Result<T, E>>) -> Result<T, CliError>
where
    CliError: From<E>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let result = runtime.block_on(task);
    runtime.shutdown_background();
    Ok(result?)
}
