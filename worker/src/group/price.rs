//! What a group's steps cost, against those of one process.

use shoal_collective::Pace;
use shoal_engine::cpu::ShardPlan;
use shoal_engine::spec::ModelSpec;

/// What the cost depends on beside the pace of the group.
pub(crate) struct Price {
    /// The split.
    pub(crate) plan: ShardPlan,
    /// What is split.
    pub(crate) spec: ModelSpec,
    /// Bytes of its weights.
    pub(crate) weights: u64,
    /// Threads of a rank.
    pub(crate) threads: usize,
}

impl Price {
    /// Logs what was measured, and warns of a group that is slower than one process. It is used
    /// nevertheless: the memory of one process may not do.
    pub(super) fn weigh(&self, pace: Option<Pace>) {
        let Self {
            plan,
            spec,
            weights,
            threads,
        } = self;
        let estimate = plan.estimate(spec, *weights, *threads, pace);
        let (saved, meetings) = (estimate.saved(), estimate.meetings);
        if let Some(Pace { latency, rate }) = pace {
            let megabytes = rate * plan.payload().bytes(1 << 20) as f64 / f64::from(1 << 20) / 1e6;
            tracing::info!(
                ?latency,
                megabytes_per_second = megabytes.round(),
                ?saved,
                ?meetings,
                "what a token saves in reading weights, and what its meetings cost"
            );
        }
        if estimate.ranks() > estimate.one {
            tracing::warn!(
                ranks = ?estimate.ranks(),
                one = ?estimate.one,
                ?saved,
                ?meetings,
                "a step would be quicker in one process{}: the ranks meet twice a layer, and wait \
                 for the largest share",
                if pace.is_some() { "" } else { " with as many threads" },
            );
        }
    }
}
