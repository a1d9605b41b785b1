//! Everything that is logged in a simulation, with its simulated time.

use std::{
    collections::HashMap,
    env, fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{Arc, Mutex},
};

use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
};

/// What is logged, unless `RUST_LOG` wants it otherwise.
const LEVELS: &str =
    "warn,simulation=debug,shoal_router=debug,shoal_worker=debug,shoal_fabric=debug";

/// Longest time in seconds between a sequence's way to a worker and its refusal.
const ROUND_TRIP: f64 = 1.3;

/// The log so far.
#[derive(Clone, Default)]
pub(crate) struct Trace(Arc<Mutex<Vec<u8>>>);

struct SimulatedTime;

impl FormatTime for SimulatedTime {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        let time = turmoil::sim_elapsed().unwrap_or_default();
        write!(w, "{:9.3}", time.as_secs_f64())
    }
}

impl io::Write for Trace {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Trace {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Trace {
    /// Collects what this process logs from now on.
    pub(crate) fn start() -> Self {
        let trace = Self::default();
        let levels = env::var("RUST_LOG");
        let levels = EnvFilter::new(levels.as_deref().unwrap_or(LEVELS));
        tracing_subscriber::fmt()
            .with_env_filter(levels)
            .with_timer(SimulatedTime)
            .with_ansi(false)
            .with_writer(trace.clone())
            .init();
        trace
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    /// Equal traces have equal digests.
    pub(crate) fn digest(&self) -> u64 {
        // With fixed keys, unlike those of a map.
        let mut hasher = DefaultHasher::new();
        self.0.lock().unwrap().hash(&mut hasher);
        hasher.finish()
    }

    /// The most attempts in a row of one sequence that brought no token.
    pub(crate) fn fruitless(&self) -> usize {
        self.most("sequence goes on elsewhere", &["sequence", "output"])
    }

    /// How often the sequence that moved most has moved while it waited.
    pub(crate) fn moves(&self) -> usize {
        self.most("waiting sequence moves", &["sequence"])
    }

    /// How many lines with a message have equal values in some fields, at most.
    fn most(&self, message: &str, fields: &[&str]) -> usize {
        let mut runs: HashMap<Vec<String>, usize> = HashMap::new();
        for line in self.text().lines().filter(|line| line.contains(message)) {
            let key = fields.iter().map(|name| field(line, name)).collect();
            *runs.entry(key).or_default() += 1;
        }
        runs.into_values().max().unwrap_or(0)
    }

    /// Sequences that were sent to a worker of which the router knew that it drains.
    pub(crate) fn misplaced(&self) -> Vec<String> {
        let mut draining: HashMap<String, f64> = HashMap::new();
        let mut broken = Vec::new();
        for line in self.text().lines() {
            let time: f64 = line
                .get(..9)
                .and_then(|t| t.trim().parse().ok())
                .unwrap_or(0.0);
            let worker = field(line, "worker");
            if line.contains("worker changed") && line.contains("DRAINING") {
                draining.insert(worker, time);
            } else if line.contains("worker changed") || line.contains("worker connected") {
                draining.remove(&worker);
            } else if line.contains("submission refused")
                && line.contains("DRAINING")
                && draining
                    .get(&worker)
                    .is_some_and(|since| time - since > ROUND_TRIP)
            {
                broken.push(format!(
                    "a sequence was sent to {worker}, which drained: {line}"
                ));
            }
        }
        broken
    }
}

/// The value of a field in a line of the log.
fn field(line: &str, name: &str) -> String {
    let mut fields = line.rsplit(' ');
    let value = fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_default().to_owned()
}
