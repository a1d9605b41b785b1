//! How quickly text that drafts is taken in and found, and what it takes of memory.

use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use shoal_core::{DraftScope, Subject, TokenId};
use shoal_draft::{Answer, Corpus, LONGEST_MATCH, Ledger, LedgerConfig, Owner, Whose};

use crate::Result;
use crate::stats::percentile_ms;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Tokens of all answers
    #[arg(long, default_value_t = 10_000_000)]
    tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128)]
    answer: usize,
    /// Lookups
    #[arg(long, default_value_t = 1_000_000)]
    lookups: usize,
}

const VOCAB: TokenId = 49_152;
const PHRASES: usize = 50_000;
const TENANTS: usize = 10;
const USERS: usize = 1000;
/// Pages of Linux.
const PAGE: usize = 4096;
/// Between answers while lookups are measured: a thousand a second, of a large cluster.
const PACE: Duration = Duration::from_millis(1);

/// Answers made of phrases, of which few are said often.
struct Texts {
    random: StdRng,
    phrases: Vec<Vec<TokenId>>,
}

impl Texts {
    fn new() -> Self {
        let mut random = StdRng::seed_from_u64(1);
        let mut phrase = || {
            let length = random.random_range(6..24);
            (0..length).map(|_| random.random_range(0..VOCAB)).collect()
        };
        let phrases = (0..PHRASES).map(|_| phrase()).collect();
        Self { random, phrases }
    }

    fn answer(&mut self, tokens: usize) -> Vec<TokenId> {
        let mut text = Vec::with_capacity(tokens + 24);
        while text.len() < tokens {
            let skewed = self.random.random::<f64>().powi(3);
            text.extend_from_slice(&self.phrases[(skewed * PHRASES as f64) as usize]);
        }
        text.truncate(tokens);
        text
    }
}

/// Bytes that the process has in memory.
fn resident() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    pages.unwrap_or(0) * PAGE
}

/// A line of the table, of times in seconds and a divisor.
fn line(what: &str, times: &mut [f64], each: usize, bytes: f64) {
    let micros = |times: &mut [f64], p| percentile_ms(times, p) * 1e3 / each as f64;
    println!(
        "| {what} | {:.2} µs | {:.2} µs | {bytes:.1} |",
        micros(times, 50.0),
        micros(times, 99.0)
    );
}

pub(crate) fn run(args: &Args) -> Result<()> {
    println!("| {} tokens | p50 | p99 | bytes a token |", args.tokens);
    println!("|---|---|---|---|");
    ledger(args);
    corpus(args);
    Ok(())
}

/// The books of a router.
fn ledger(args: &Args) {
    let mut texts = Texts::new();
    let config = LedgerConfig {
        bytes: args.tokens * 35,
        ..LedgerConfig::default()
    };
    let before = resident();
    let mut ledger = Ledger::new(config, 1);
    let now = Instant::now();
    let mut times = Vec::new();
    for i in 0..args.tokens / args.answer {
        let (tenant, user) = (
            format!("tenant {}", i % TENANTS),
            format!("user {}", i % USERS),
        );
        let scope = DraftScope::tenant("model", b"tokenizer", &tenant, "");
        let subject = Subject::tenant(&tenant);
        let tokens = texts.answer(args.answer);
        let answer = Answer {
            owner: Owner {
                model: "model".into(),
                tenant: tenant.as_str().into(),
                scope,
            },
            scope: scope.user(&user),
            whose: Whose {
                tenant: subject,
                user: Some(subject.user(&user)),
            },
            tokens: tokens.into(),
            secrets: Vec::new(),
        };
        let start = Instant::now();
        ledger.learn(answer, now);
        times.push(start.elapsed().as_secs_f64());
    }
    let bytes = (resident() - before) as f64 / args.tokens as f64;
    line("a router takes a token in", &mut times, args.answer, bytes);
}

/// The corpus of a scope at a worker.
fn corpus(args: &Args) {
    let mut texts = Texts::new();
    let corpus = Arc::new(RwLock::new(Corpus::new(args.tokens.next_power_of_two())));
    let mut push = |times: &mut Vec<f64>| {
        let text = texts.answer(args.answer);
        let start = Instant::now();
        let mut corpus = corpus.write().unwrap_or_else(PoisonError::into_inner);
        corpus.push(&text, start);
        drop(corpus);
        times.push(start.elapsed().as_secs_f64());
        text
    };
    let mut times = Vec::new();
    let mut known = Vec::new();
    for _ in 0..args.tokens / args.answer {
        let text = push(&mut times);
        if known.len() < 1 << 16 {
            known.push(text);
        }
    }
    let bytes = {
        let corpus = corpus.read().unwrap_or_else(PoisonError::into_inner);
        corpus.bytes() as f64 / corpus.len() as f64
    };
    line("a worker takes a token in", &mut times, args.answer, bytes);

    let done = AtomicBool::new(false);
    let mut found = 0;
    let mut times = Vec::with_capacity(args.lookups);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut times = Vec::new();
            while !done.load(Ordering::Relaxed) {
                push(&mut times);
                std::thread::sleep(PACE);
            }
        });
        let mut random = StdRng::seed_from_u64(2);
        for _ in 0..args.lookups {
            let context = &known[random.random_range(0..known.len())];
            let end = random.random_range(8..context.len());
            let context = &context[end.saturating_sub(LONGEST_MATCH)..end];
            let start = Instant::now();
            let corpus = corpus.read().unwrap_or_else(PoisonError::into_inner);
            let longest = black_box(corpus.longest(context));
            drop(corpus);
            times.push(start.elapsed().as_secs_f64());
            found += usize::from(longest.is_some());
        }
        done.store(true, Ordering::Relaxed);
    });
    line(
        "a lookup, beside answers that come in",
        &mut times,
        1,
        bytes,
    );
    println!(
        "\n{:.0} % found",
        100.0 * found as f64 / args.lookups as f64
    );
}
