//! What every generation needs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{admission::Admission, cluster::Cluster, metrics::Metrics, retry::RetryBudget};

/// What every generation needs.
#[derive(Debug)]
pub(crate) struct Dispatch {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) metrics: Metrics,
    pub(crate) resume_window: Duration,
    retries: RetryBudget,
    sequences: AtomicU64,
}

impl Dispatch {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        admission: Arc<Admission>,
        metrics: Metrics,
        resume_window: Duration,
    ) -> Self {
        Self {
            cluster,
            admission,
            metrics,
            resume_window,
            retries: RetryBudget::new(),
            sequences: AtomicU64::new(1),
        }
    }

    /// The number of a new generation, which earns its share of a retry.
    pub(crate) fn begin(&self) -> u64 {
        self.retries.deposit();
        self.sequences.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether the retry budget holds one more.
    pub(crate) fn may_retry(&self) -> bool {
        let granted = self.retries.withdraw();
        if !granted {
            self.metrics.refused_retries.inc();
        }
        granted
    }

    /// When a worker is predicted to have room again.
    pub(crate) fn retry_after(&self) -> Duration {
        let throughput = self.cluster.throughput();
        throughput.drain_time(&self.admission.backlog())
    }
}
