//! `shoal`: every role of a Shoal cluster in one binary, and the tools around it.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod client;
mod config;
mod corpus;
mod error;
mod inspect;
mod model;
mod operate;
mod role;
mod store;
mod up;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use shoal_core::Class;
use shoal_fabric::telemetry;

use args::{BenchCommand, Cli, Command, ModelCommand};
use config::{ConfigFile, LogSettings, MembershipSettings, Section};
use error::CliError;

pub(crate) use error::chain;

/// The exit status for wrong usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let started = Instant::now();
    match run(Cli::parse(), started) {
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

fn run(cli: Cli, started: Instant) -> Result<(), CliError> {
    let file = match &cli.config {
        Some(path) => ConfigFile::load(path)?,
        None => ConfigFile::default(),
    };
    let (log, trace) = (file.merge(&cli.log)?, file.merge(&cli.trace)?);
    match cli.command {
        Command::Up(args) => {
            let settings = file.merge(&args.settings)?;
            if args.print_config {
                return print_config(&settings);
            }
            let log = log.config("info")?;
            // The supervisor has nothing to trace.
            telemetry::init(&log, None)?;
            let (router, worker) = (file.ambient()?, file.ambient()?);
            let source = settings.source(&worker)?;
            let model = model::store(&args.store, &file)?.resolve(&source)?;
            let path = cli.config.as_deref();
            let config = settings.config(model, path, &log, &trace, &router, &worker)?;
            block_on(up::run(config, started))?;
        }
        Command::Router(args) => {
            let settings = file.merge(&args.settings)?;
            let membership = file.merge(&args.membership)?;
            if args.print_config {
                return print_role(&settings, &membership);
            }
            let (log, trace) = (log.config("info")?, trace.config("shoal-router"));
            let _exporter = telemetry::init(&log, trace.as_ref())?;
            block_on(role::router(settings, membership, args.supervised))?;
        }
        Command::Worker(args) => {
            let settings = file.merge(&args.settings)?;
            let membership = file.merge(&args.membership)?;
            if args.print_config {
                return print_role(&settings, &membership);
            }
            let log = log.config("info")?;
            let trace = trace.config("shoal-worker");
            let _exporter = telemetry::init(&log, trace.as_ref())?;
            let store = model::store(&args.store, &file)?;
            block_on(role::worker(
                settings,
                log,
                membership,
                store,
                args.supervised,
            ))?;
        }
        Command::Rank => {
            start_log(log, "info")?;
            shoal_worker::run_rank()?;
        }
        Command::Chat(args) => {
            start_log(log, "warn")?;
            block_on(chat::run(args))?;
        }
        Command::Corpus(command) => {
            start_log(log, "warn")?;
            let lines = block_on(corpus::run(command))?;
            model::print(|out| lines.iter().try_for_each(|line| writeln!(out, "{line}")))?;
        }
        Command::Status(args) => {
            start_log(log, "warn")?;
            block_on(operate::status(args))?;
        }
        Command::Drain(args) => {
            start_log(log, "warn")?;
            block_on(operate::drain(args))?;
        }
        Command::Undrain(args) => {
            start_log(log, "warn")?;
            block_on(operate::undrain(args))?;
        }
        Command::Bench(BenchCommand::Serve(args)) => {
            start_log(log, "warn")?;
            let report = block_on(bench::serve(&args))?;
            model::print(|out| match args.json {
                true => writeln!(out, "{}", serde_json::to_string(&report)?),
                false => write!(out, "{report}"),
            })?;
        }
        Command::Bench(BenchCommand::Engine(args)) => {
            start_log(log, "warn")?;
            let path = model::store(&args.store, &file)?.resolve(&args.model)?;
            let report = bench::engine::run(&args, &path)
                .map_err(|source| CliError::EngineBench { path, source })?;
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
                ModelCommand::Random(args) => model::random(&args)?,
            }
        }
    }
    Ok(())
}

/// The settings that are made, as a configuration file would have them.
fn print_config<S: Section>(settings: &S) -> Result<(), CliError> {
    let text = toml::to_string(settings)?;
    model::print(|out| write!(out, "[{}]\n{text}", S::NAME))
}

/// The settings that are made of a role and of how it finds the cluster.
fn print_role<S: Section>(settings: &S, membership: &MembershipSettings) -> Result<(), CliError> {
    print_config(settings)?;
    model::print(|out| writeln!(out))?;
    print_config(membership)
}

fn start_log(settings: LogSettings, default: &str) -> Result<(), CliError> {
    telemetry::init(&settings.config(default)?, None)?;
    Ok(())
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
