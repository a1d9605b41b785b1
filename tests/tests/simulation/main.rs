//! A cluster in simulated time over a simulated network: the real router, real workers over a
//! model of no weights, and clients, while processes, links and etcd fail at random. See
//! `docs/simulation.md`.
//!
//! Each seed is a process, in which nothing but the seed is random.

#![allow(clippy::unwrap_used)]
#![forbid(unsafe_code)]

mod client;
mod etcd;
mod faults;
mod laws;
mod look;
mod network;
mod trace;
mod worker;
mod world;

use std::{
    env,
    process::{Command, ExitCode, Output},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

/// Which seed to run, and where from to count.
const SEED: &str = "SHOAL_SIMULATION_SEED";
/// How many seeds to run.
const SEEDS: &str = "SHOAL_SIMULATION_SEEDS";
const DEFAULT_SEEDS: u64 = 200;
/// Of so many seeds one runs twice, and must leave the same trace.
const REPLAYED: u64 = 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--list") {
        println!("simulation: test");
        return ExitCode::SUCCESS;
    }
    // As the names of other tests.
    let mut names = arguments.iter().filter(|a| !a.starts_with('-')).peekable();
    if names.peek().is_some() && !names.any(|name| "simulation".contains(name.as_str())) {
        return ExitCode::SUCCESS;
    }
    match number(SEED) {
        Some(seed) => one(seed),
        None => many(number(SEEDS).unwrap_or(DEFAULT_SEEDS)),
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is a number, not {text:?}")),
    )
}

/// Runs a seed in this process.
fn one(seed: u64) -> ExitCode {
    let trace = world::prepare(seed);
    // On a thread of its own, whose first random numbers are those of the seed.
    let run = thread::spawn(move || world::run(seed));
    let broken = run
        .join()
        .unwrap_or_else(|_| vec!["the simulation panicked".into()]);
    let broken = [broken, laws::check_trace(&trace)].concat();
    println!("seed {seed}: trace {:016x}", trace.digest());
    if broken.is_empty() && env::var_os("SHOAL_SIMULATION_TRACE").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("{}", trace.text());
    for law in &broken {
        println!("broken: {law}");
    }
    ExitCode::from(u8::from(!broken.is_empty()))
}

/// Runs a seed in a process of its own.
fn process(seed: u64) -> Output {
    let own = env::current_exe().expect("this program");
    let run = Command::new(own).env(SEED, seed.to_string()).output();
    run.expect("a process for a seed")
}

/// Runs so many seeds, on all CPUs.
fn many(seeds: u64) -> ExitCode {
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let run = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds {
            return;
        }
        let first = process(seed);
        let replays = seed % REPLAYED == 0;
        let differs = replays && first.stdout != process(seed).stdout;
        if differs || !first.status.success() {
            failed.fetch_add(1, Ordering::Relaxed);
            let output = String::from_utf8_lossy(&first.stdout);
            let laws = output.lines().filter(|line| line.starts_with("broken: "));
            println!("seed {seed} fails");
            laws.for_each(|law| println!("    {law}"));
            if differs {
                println!("    broken: its second run left another trace");
            }
            let panic = String::from_utf8_lossy(&first.stderr);
            panic.lines().for_each(|line| println!("    {line}"));
            println!("    {SEED}={seed} cargo test --release -p shoal-tests --test simulation");
        }
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(run);
        }
    });
    let failed = failed.into_inner();
    println!(
        "simulation: {} of {seeds} seeds keep the laws",
        seeds - failed
    );
    ExitCode::from(u8::from(failed > 0))
}
