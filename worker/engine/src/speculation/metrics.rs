//! What speculation tells about itself.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::drafting::Settled;
use super::hazard::{POSITIONS, position_bucket};

/// Names of the positions' buckets.
const POSITION_NAMES: [&str; POSITIONS] = ["1", "2-3", "4-7", "8-15", "16-32"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Source {
    drafter: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Place {
    position: &'static str,
}

/// Clones share their values.
#[derive(Clone, Debug)]
pub(crate) struct DraftMetrics {
    drafted: Family<Source, Counter>,
    accepted: Family<Source, Counter>,
    drafted_at: Family<Place, Counter>,
    accepted_at: Family<Place, Counter>,
    step_tokens: Histogram,
    saved: Gauge<f64, AtomicU64>,
    price: Gauge<f64, AtomicU64>,
}

impl Default for DraftMetrics {
    fn default() -> Self {
        Self {
            drafted: Family::default(),
            accepted: Family::default(),
            drafted_at: Family::default(),
            accepted_at: Family::default(),
            step_tokens: Histogram::new([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 33.0]),
            saved: Gauge::default(),
            price: Gauge::default(),
        }
    }
}

impl DraftMetrics {
    pub(crate) fn register(&self, r: &mut Registry) {
        r.register(
            "draft_tokens",
            "Draft tokens verified, by drafter",
            self.drafted.clone(),
        );
        r.register(
            "accepted_draft_tokens",
            "Draft tokens that were right, by drafter",
            self.accepted.clone(),
        );
        r.register(
            "draft_position_tokens",
            "Draft tokens verified, by their position in the draft, from 1",
            self.drafted_at.clone(),
        );
        r.register(
            "accepted_draft_position_tokens",
            "Draft tokens that were right, by their position in the draft, from 1",
            self.accepted_at.clone(),
        );
        r.register(
            "sequence_step_tokens",
            "Tokens that a step made for a sequence with a draft",
            self.step_tokens.clone(),
        );
        r.register_with_unit(
            "draft_saved",
            "Time that steps without drafts would have taken longer for the same tokens",
            Unit::Seconds,
            self.saved.clone(),
        );
        r.register(
            "draft_price_ratio",
            "Chance that one more draft row must have to be worth its time",
            self.price.clone(),
        );
    }

    /// Counts what became of a draft.
    pub(crate) fn settle(&self, settled: Settled) {
        let source = Source {
            drafter: settled.drafter.name(),
        };
        let count = |family: &Family<_, Counter>, tokens: usize| {
            family.get_or_create(&source).inc_by(tokens as u64);
        };
        count(&self.drafted, settled.rows);
        count(&self.accepted, settled.accepted);
        for (family, tokens) in [
            (&self.drafted_at, settled.rows),
            (&self.accepted_at, settled.accepted),
        ] {
            let mut by_place = [0; POSITIONS];
            (0..tokens).for_each(|position| by_place[position_bucket(position)] += 1);
            for (position, tokens) in POSITION_NAMES.into_iter().zip(by_place) {
                if tokens > 0 {
                    family.get_or_create(&Place { position }).inc_by(tokens);
                }
            }
        }
        self.step_tokens.observe((settled.accepted + 1) as f64);
    }

    /// Counts time saved; negative where drafts cost some.
    pub(crate) fn saved(&self, seconds: f64) {
        self.saved.inc_by(seconds);
    }

    pub(crate) fn price(&self, price: f64) {
        self.price.set(price);
    }
}
