//! Where the time of a step goes.

use std::time::{Duration, Instant};

/// A part of a step; those of a layer add up over the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Plan, embeddings and rotations.
    Begin,
    /// Norms and the quantisation of what they give.
    Norm,
    /// Queries, keys and values, rotated and stored.
    Qkv,
    /// Attention.
    Attention,
    /// The projection of what attention gives.
    Output,
    /// Gates and ups.
    GateUp,
    /// The projection of what they give.
    Down,
    /// Logits.
    Head,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 8] = [
        Self::Begin,
        Self::Norm,
        Self::Qkv,
        Self::Attention,
        Self::Output,
        Self::GateUp,
        Self::Down,
        Self::Head,
    ];

    /// A short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::Attention => "attention",
            Self::Output => "output",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Head => "head",
        }
    }
}

/// The time that each phase of the last step took.
#[derive(Clone, Copy, Debug)]
pub struct PhaseTimes {
    times: [Duration; Phase::ALL.len()],
    last: Instant,
}

impl PhaseTimes {
    /// A step begins.
    pub(super) fn start() -> Self {
        Self {
            times: [Duration::ZERO; Phase::ALL.len()],
            last: Instant::now(),
        }
    }

    /// What ran since the last call was `phase`.
    pub(super) fn lap(&mut self, phase: Phase) {
        let now = Instant::now();
        self.times[phase as usize] += now - self.last;
        self.last = now;
    }

    /// The time of a phase.
    pub fn of(&self, phase: Phase) -> Duration {
        self.times[phase as usize]
    }
}
