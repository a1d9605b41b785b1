//! Which worker takes a sequence: the one that is predicted to finish it first.

use shoal_proto::worker::Load;

use crate::session::Placed;

/// Assumed of a worker that has not measured itself yet, in tokens per second.
const PRIOR_PREFILL_TPS: f64 = 1000.0;
const PRIOR_DECODE_TPS: f64 = 50.0;
/// Seconds that a half-full KV pool adds: preemptions become likely as it fills.
const KV_PRESSURE: f64 = 0.05;

/// The work that a sequence brings.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Work {
    /// Tokens to prefill if nothing is cached.
    pub(crate) prompt: f64,
    /// Expected output tokens.
    pub(crate) output: f64,
}

impl Work {
    /// The work of several such sequences.
    pub(crate) fn times(self, sequences: u32) -> Self {
        let n = f64::from(sequences);
        Self {
            prompt: n * self.prompt,
            output: n * self.output,
        }
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.prompt += other.prompt;
        self.output += other.output;
    }
}

impl std::ops::SubAssign for Work {
    fn sub_assign(&mut self, other: Self) {
        self.prompt -= other.prompt;
        self.output -= other.output;
    }
}

/// What is known of a worker that could take it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Candidate {
    /// As it reported last.
    pub(crate) load: Load,
    /// What this router put there.
    pub(crate) placed: Placed,
    /// It holds the conversation's earlier turns.
    pub(crate) affine: bool,
}

/// Prompt tokens per second.
pub(crate) fn prefill_tps(load: &Load) -> f64 {
    measured(load.prefill_tps, PRIOR_PREFILL_TPS)
}

/// Output tokens per second, over all rows.
pub(crate) fn decode_tps(load: &Load) -> f64 {
    measured(load.decode_tps, PRIOR_DECODE_TPS)
}

/// What was measured, or `prior` where nothing was.
fn measured(rate: f64, prior: f64) -> f64 {
    if rate.is_finite() && rate > 0.0 {
        rate
    } else {
        prior
    }
}

impl Candidate {
    /// Predicted seconds until the work is done here:
    ///
    /// `(waiting + prompt) / prefill_tps + output · (rows + 1) / decode_tps + λ · kv / (1 − kv)`
    ///
    /// A report is older than this router's own placements, so each quantity is the larger of
    /// the reported and the placed. The prompt of an affine worker counts as cached.
    fn seconds(&self, work: &Work) -> f64 {
        let load = &self.load;
        let waiting = load
            .waiting_uncached_tokens
            .max(self.placed.unstarted_tokens);
        let rows = load.running.saturating_add(load.waiting);
        let rows = f64::from(rows.max(self.placed.sequences));
        let prompt = if self.affine { 0.0 } else { work.prompt };
        let kv = measured(load.kv_usage, 0.0).min(0.99);
        (waiting as f64 + prompt) / prefill_tps(load)
            + work.output * (rows + 1.0) / decode_tps(load)
            + KV_PRESSURE * kv / (1.0 - kv)
    }
}

/// The index of the cheapest candidate; the fewest placed sequences win where the cost is
/// equal, then the first.
pub(crate) fn cheapest(candidates: &[Candidate], work: &Work) -> Option<usize> {
    let cost = |i: usize| (candidates[i].seconds(work), candidates[i].placed.sequences);
    (0..candidates.len()).min_by(|&i, &j| {
        let ((a, m), (b, n)) = (cost(i), cost(j));
        a.total_cmp(&b).then(m.cmp(&n))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(load: Load) -> Candidate {
        Candidate {
            load,
            ..Candidate::default()
        }
    }

    fn measured_load() -> Load {
        Load {
            prefill_tps: 1000.0,
            decode_tps: 100.0,
            ..Load::default()
        }
    }

    const WORK: Work = Work {
        prompt: 100.0,
        output: 10.0,
    };

    #[test]
    fn nobody_is_no_choice() {
        assert_eq!(cheapest(&[], &WORK), None);
    }

    #[test]
    fn cost_is_in_seconds() {
        let idle = candidate(measured_load());
        assert!((idle.seconds(&WORK) - 0.2).abs() < 1e-9);
        let busy = candidate(Load {
            waiting_uncached_tokens: 400,
            running: 3,
            kv_usage: 0.5,
            ..measured_load()
        });
        assert!((busy.seconds(&WORK) - (0.5 + 0.4 + 0.05)).abs() < 1e-9);
    }

    #[test]
    fn the_faster_worker_wins_and_a_queue_turns_it() {
        let slow = candidate(measured_load());
        let mut fast = candidate(Load {
            prefill_tps: 4000.0,
            decode_tps: 400.0,
            ..Load::default()
        });
        assert_eq!(cheapest(&[slow, fast], &WORK), Some(1));
        fast.load.waiting_uncached_tokens = 4000;
        assert_eq!(cheapest(&[slow, fast], &WORK), Some(0));
    }

    #[test]
    fn own_placements_spread_a_burst_between_reports() {
        let mut workers = [candidate(measured_load()); 3];
        for _ in 0..30 {
            let chosen = cheapest(&workers, &WORK).unwrap();
            workers[chosen].placed.sequences += 1;
            workers[chosen].placed.unstarted_tokens += 100;
        }
        assert!(workers.iter().all(|w| w.placed.sequences == 10));
    }

    #[test]
    fn affinity_is_a_credit_and_melts_under_load() {
        let other = candidate(measured_load());
        let mut home = Candidate {
            affine: true,
            ..other
        };
        assert_eq!(cheapest(&[other, home], &WORK), Some(1));
        home.load.running = 2;
        assert_eq!(cheapest(&[other, home], &WORK), Some(0));
    }

    #[test]
    fn nonsense_from_a_worker_is_no_nan() {
        let odd = candidate(Load {
            kv_usage: f64::NAN,
            prefill_tps: f64::NAN,
            decode_tps: -1.0,
            ..Load::default()
        });
        let sane = candidate(measured_load());
        assert_eq!(cheapest(&[odd, sane], &WORK), Some(1));
    }
}
