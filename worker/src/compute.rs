//! What compute threads got of the cores, as the system's scheduler counts it.
//!
//! A step on two cores takes half as long again when something else wants one of them. Steps
//! alone don't tell that from slow kernels; the time that threads were ready to run and had no
//! core does.

use std::fmt;
use std::fs;
use std::ops::Sub;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Unit;

/// Names of the threads that compute, or how they begin: the engine's or that of a rank elsewhere,
/// and its pool's.
const COMPUTE: [&str; 3] = ["engine", "rank", "compute-"];

/// Times of some threads since they began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoreTime {
    /// On a core.
    pub ran: Duration,
    /// Ready to run, while other threads had the cores.
    pub waited: Duration,
}

impl CoreTime {
    /// Of those of this process's threads whose name begins with one of `names`. Zero where
    /// the system does not tell.
    pub fn of_threads(names: &[&str]) -> Self {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
        let mut sum = Self::default();
        // A thread may end while this looks.
        for task in tasks.flatten() {
            let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let name = read("comm");
            if names.iter().any(|start| name.starts_with(start)) {
                let time = Self::from_schedstat(&read("schedstat")).unwrap_or_default();
                sum.ran += time.ran;
                sum.waited += time.waited;
            }
        }
        sum
    }

    /// From a thread's `schedstat`: nanoseconds on a core, nanoseconds waited, slices.
    fn from_schedstat(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace().map(str::parse);
        let mut next = || words.next()?.ok().map(Duration::from_nanos);
        Some(Self {
            ran: next()?,
            waited: next()?,
        })
    }

    /// The part of the time in which there was something to run that had no core.
    pub fn waited_share(&self) -> f64 {
        let wanted = (self.ran + self.waited).as_secs_f64();
        if wanted > 0.0 {
            self.waited.as_secs_f64() / wanted
        } else {
            0.0
        }
    }
}

impl Sub for CoreTime {
    type Output = Self;

    /// What came since `earlier`.
    fn sub(self, earlier: Self) -> Self {
        Self {
            ran: self.ran.saturating_sub(earlier.ran),
            waited: self.waited.saturating_sub(earlier.waited),
        }
    }
}

/// Reads the times of the threads that compute whenever somebody scrapes.
#[derive(Debug)]
pub(crate) struct ComputeCollector;

impl Collector for ComputeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let time = CoreTime::of_threads(&COMPUTE);
        for (name, help, time) in [
            (
                "worker_compute",
                "Time that compute threads ran on a core",
                time.ran,
            ),
            (
                "worker_compute_wait",
                "Time that compute threads were ready to run and other threads had the cores",
                time.waited,
            ),
        ] {
            let counter = ConstCounter::new(time.as_secs_f64());
            let unit = Some(&Unit::Seconds);
            counter.encode(encoder.encode_descriptor(
                name,
                help,
                unit,
                counter.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_line_of_the_scheduler_is_read() {
        let time = CoreTime::from_schedstat("3000000000 1000000000 443\n").unwrap();
        assert_eq!(time.ran, Duration::from_secs(3));
        assert_eq!(time.waited_share(), 0.25);
        assert_eq!(CoreTime::from_schedstat("12"), None);
        assert_eq!(CoreTime::default().waited_share(), 0.0);
    }

    #[test]
    fn threads_count_by_their_name() {
        let before = CoreTime::of_threads(&["timed-"]);
        assert_eq!(before, CoreTime::default());
        let (end, looked) = channel::<()>();
        let (spun, ready) = channel();
        let thread = thread::Builder::new().name("timed-1".into());
        let thread = thread.spawn(move || {
            let mut sum = 0u64;
            // The scheduler counts in ticks: work until it has counted some.
            while CoreTime::of_threads(&["timed-"]).ran.is_zero() {
                sum = (0..1 << 16).fold(sum, |sum, i| std::hint::black_box(sum ^ i));
            }
            spun.send(sum).unwrap();
            looked.recv().ok()
        });
        let thread = thread.unwrap();
        ready.recv().unwrap();
        let time = CoreTime::of_threads(&["timed-"]) - before;
        assert!(!time.ran.is_zero());
        drop(end);
        thread.join().unwrap();
    }
}
