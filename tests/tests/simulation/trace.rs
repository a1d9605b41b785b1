//! Everything that is logged in a simulation, with its simulated time.

use std::{
    collections::HashMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{Arc, Mutex},
};

use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
};

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
        let levels = EnvFilter::new(
            "warn,simulation=debug,shoal_router=debug,shoal_worker=debug,shoal_fabric=debug",
        );
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
        let mut runs: HashMap<(String, String), usize> = HashMap::new();
        for line in self.text().lines() {
            let Some((_, fields)) = line.split_once("sequence goes on elsewhere ") else {
                continue;
            };
            let field = |name: &str| {
                let mut fields = fields.split(' ');
                fields
                    .find_map(|f| f.strip_prefix(name))
                    .unwrap_or_default()
                    .to_owned()
            };
            *runs
                .entry((field("sequence="), field("output=")))
                .or_default() += 1;
        }
        runs.into_values().max().unwrap_or(0)
    }
}
