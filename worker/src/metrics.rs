//! The worker's own metrics, beside the engine's.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use shoal_proto::worker::{Finish, RejectReason};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Clones share their values.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkerMetrics {
    pub(crate) sessions: Gauge,
    rejected: Family<Reason, Counter>,
    finished: Family<Reason, Counter>,
}

impl WorkerMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("worker");
        r.register(
            "sessions",
            "Open sessions of routers",
            self.sessions.clone(),
        );
        r.register(
            "rejected_sequences",
            "Sequences that were not taken, by reason",
            self.rejected.clone(),
        );
        r.register(
            "finished_sequences",
            "Sequences that ended, by reason",
            self.finished.clone(),
        );
    }

    pub(crate) fn rejected(&self, reason: RejectReason) {
        let reason = match reason {
            RejectReason::Unspecified => "unspecified",
            RejectReason::Overloaded => "overloaded",
            RejectReason::Draining => "draining",
            RejectReason::Invalid => "invalid",
            RejectReason::StaleEpoch => "stale_epoch",
            RejectReason::NumericsMismatch => "numerics_mismatch",
        };
        self.rejected.get_or_create(&Reason { reason }).inc();
    }

    pub(crate) fn finished(&self, finish: Finish) {
        let reason = match finish {
            Finish::Unspecified => "unspecified",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
            Finish::Deadline => "deadline",
            Finish::Preempted => "preempted",
        };
        self.finished.get_or_create(&Reason { reason }).inc();
    }
}
