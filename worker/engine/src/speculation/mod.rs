//! Speculative decoding: drafts, how many of their tokens are verified, and what that teaches.
//!
//! Verifying is nothing but sampling (`step.rs`), so nothing here can change a token. What is
//! decided here is speed: a draft row is computed only while the chance that it is reached and
//! right exceeds its price.

mod admission;
mod curve;
mod drafting;
mod hazard;
mod metrics;
mod pushed;
#[cfg(test)]
mod simulation;

use shoal_core::MAX_DRAFT_ROWS;

pub use self::pushed::{MAX_DRAFT_NODES, PushedDraft};

pub(crate) use self::admission::{Slack, Speculator};
pub(crate) use self::drafting::{Drafting, Settled, Text};
pub(crate) use self::hazard::Hazards;
pub(crate) use self::metrics::DraftMetrics;

const MAX_DRAFT: usize = MAX_DRAFT_ROWS as usize;

/// Where a draft comes from. Of equally good ones the first is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Drafter {
    /// The sequence's own prompt and output.
    Session,
    /// What the same user was answered before.
    User,
    /// What several users of the tenant were answered.
    Tenant,
    /// Public text of the tenant.
    Public,
    /// A draft worker.
    Pushed,
}

impl Drafter {
    const COUNT: usize = 5;
    const ALL: [Self; Self::COUNT] = [
        Self::Session,
        Self::User,
        Self::Tenant,
        Self::Public,
        Self::Pushed,
    ];

    /// Its name in the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::User => "user",
            Self::Tenant => "tenant",
            Self::Public => "public",
            Self::Pushed => "pushed",
        }
    }
}
