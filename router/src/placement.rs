//! Which worker takes a sequence: the one that is predicted to finish it first.

use std::str::FromStr;

use shoal_core::Class;
use shoal_proto::worker::Load;

use crate::session::Placed;

/// Assumed of a worker that has not measured itself yet, in tokens per second.
const PRIOR_PREFILL_TPS: f64 = 1000.0;
const PRIOR_DECODE_TPS: f64 = 50.0;
/// Seconds that a half-full KV pool adds: preemptions become likely as it fills.
const KV_PRESSURE: f64 = 0.05;
/// Share of a step's base that a row costs at least: where rows look free, the noise of the
/// base alone would choose, and choose the same worker again and again.
const LEAST_ROW: f64 = 0.02;
/// Chance that what a prompt pushes out of a full cache is asked for again.
const EVICTION: f64 = 0.5;

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

/// What is known of a worker that could take a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Candidate {
    /// As it reported last.
    pub(crate) load: Load,
    /// What this router had there when the report came; the rest of the load is others'.
    pub(crate) reported: Placed,
    /// What this router has there now.
    pub(crate) placed: Placed,
    /// Tokens of the sequence that need no prefill here.
    pub(crate) cached: f64,
    /// How full its prefix cache is, 0 to 1.
    pub(crate) fill: f64,
}

/// How a worker is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// The lowest predicted time: queue, prefill of what is not cached, decode.
    #[default]
    Cost,
    /// One after the other.
    RoundRobin,
    /// The fewest sequences.
    LeastLoad,
    /// The fewer sequences of two drawn at random (Mitzenmacher 2001).
    PowerOfTwo,
}

impl FromStr for Routing {
    type Err = RoutingError;

    fn from_str(name: &str) -> Result<Self, RoutingError> {
        match name {
            "cost" => Ok(Self::Cost),
            "round-robin" => Ok(Self::RoundRobin),
            "least-load" => Ok(Self::LeastLoad),
            "power-of-two" => Ok(Self::PowerOfTwo),
            _ => Err(RoutingError { given: name.into() }),
        }
    }
}

/// Not a way to choose.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the routing is cost, round-robin, least-load or power-of-two, not {given:?}")]
pub struct RoutingError {
    given: String,
}

impl RoutingError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
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
    /// Sequences there: this router's own, and those of others.
    fn rows(&self) -> f64 {
        let reported = self.load.running.saturating_add(self.load.waiting);
        let others = reported.saturating_sub(self.reported.sequences);
        f64::from(others) + f64::from(self.placed.sequences)
    }

    /// Tokens that wait for their prefill there.
    fn waiting(&self) -> f64 {
        let reported = self.load.waiting_uncached_tokens;
        let others = reported.saturating_sub(self.reported.unstarted_tokens);
        others as f64 + self.placed.unstarted_tokens as f64
    }

    /// Predicted seconds that the worker's load adds to the work:
    ///
    /// `waiting · token + output · rows · row + λ · kv / (1 − kv)`
    fn backlog(&self, pace: &Pace, work: &Work) -> f64 {
        let kv = measured(self.load.kv_usage, 0.0).min(0.99);
        self.waiting() * pace.token
            + work.output * self.rows() * pace.row
            + KV_PRESSURE * kv / (1.0 - kv)
    }

    /// Predicted seconds until the work is done here, and of work that it makes by what it
    /// pushes out of the cache. The least loaded candidate has `least` of backlog:
    ///
    /// `backlog + prompt · token − credit + output · (base + row) + μ · fill · uncached · token`
    ///
    /// The credit is the saved prefill `s`, decayed as `s / (1 + excess / s)` by the backlog
    /// in excess of the least: a prefix that everybody asks for spreads over workers before
    /// the queue at its first one has eaten all that it saves.
    fn seconds(&self, pace: &Pace, work: &Work, least: f64) -> f64 {
        let backlog = self.backlog(pace, work);
        let saved = self.cached * pace.token;
        let credit = match saved + backlog - least {
            0.0 => 0.0,
            sum => saved * saved / sum,
        };
        let uncached = (work.prompt - self.cached).max(0.0);
        backlog + work.prompt * pace.token - credit
            + work.output * (pace.base + pace.row)
            + EVICTION * self.fill * uncached * pace.token
    }
}

/// What work takes on a worker, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pace {
    /// A token's prefill.
    token: f64,
    /// A decode step of n rows takes `base + n · row`.
    base: f64,
    row: f64,
}

impl Pace {
    /// As the worker has fitted it to its steps, and `token` where it has not seen enough
    /// prompts yet.
    fn fitted(load: &Load, token: Option<f64>) -> Option<Self> {
        let row = measured(load.step_row_ms, 0.0) / 1e3;
        let base = measured(load.step_base_ms, 0.0) / 1e3;
        let token = prompt_token(load).or(token);
        (base + row > 0.0).then_some(Self {
            token: token.unwrap_or_else(|| 1.0 / prefill_tps(load)),
            base,
            row: row.max(LEAST_ROW * base),
        })
    }

    /// By its rates, which are guesses where it has done nothing yet.
    fn of_rates(load: &Load) -> Self {
        Self {
            token: 1.0 / prefill_tps(load),
            base: 0.0,
            row: 1.0 / decode_tps(load),
        }
    }

    fn mean(paces: impl Iterator<Item = Self>) -> Option<Self> {
        let [token, base, row] = mean(paces.map(|pace| [pace.token, pace.base, pace.row]))?;
        Some(Self { token, base, row })
    }
}

/// Seconds of a prompt's token, as the worker has measured it.
fn prompt_token(load: &Load) -> Option<f64> {
    let row = measured(load.prompt_row_ms, 0.0) / 1e3;
    (row > 0.0).then_some(row)
}

fn mean<const N: usize>(values: impl Iterator<Item = [f64; N]>) -> Option<[f64; N]> {
    let (mut sums, mut count) = ([0.0; N], 0.0);
    for values in values {
        sums.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        count += 1.0;
    }
    (count > 0.0).then(|| sums.map(|sum| sum / count))
}

/// The index of the candidate that `routing` takes; `turn` counts the choices so far.
pub(crate) fn choose(
    routing: Routing,
    candidates: &[Candidate],
    work: &Work,
    turn: usize,
) -> Option<usize> {
    let count = candidates.len();
    let rows = |i: &usize| candidates[*i].rows() as u64;
    match routing {
        _ if count == 0 => None,
        Routing::Cost => cheapest(candidates, work),
        Routing::RoundRobin => Some(turn % count),
        // Equal ones take turns.
        Routing::LeastLoad => (turn..turn + count).map(|i| i % count).min_by_key(rows),
        Routing::PowerOfTwo => {
            let first = rand::random_range(0..count);
            let second = (first + rand::random_range(1..count.max(2))) % count;
            [first, second].into_iter().min_by_key(rows)
        }
    }
}

/// The index of the cheapest candidate; the fewest placed sequences win where the cost is
/// equal, then the first. A worker that has not got to know itself yet is taken for an average
/// one: it would never be tried if it were taken for a slow one.
fn cheapest(candidates: &[Candidate], work: &Work) -> Option<usize> {
    let tokens = candidates.iter().filter_map(|c| prompt_token(&c.load));
    let token = mean(tokens.map(|token| [token])).map(|[token]| token);
    let fitted = |c: &Candidate| Pace::fitted(&c.load, token);
    let average = Pace::mean(candidates.iter().filter_map(fitted));
    let pace = |c: &Candidate| {
        let own = fitted(c).or(average);
        own.unwrap_or_else(|| Pace::of_rates(&c.load))
    };
    let backlogs = candidates.iter().map(|c| c.backlog(&pace(c), work));
    let least = backlogs.fold(f64::INFINITY, f64::min);
    let costs = candidates
        .iter()
        .map(|c| (c.seconds(&pace(c), work, least), c.placed.sequences));
    let cheapest = costs
        .enumerate()
        .min_by(|(_, (a, m)), (_, (b, n))| a.total_cmp(b).then(m.cmp(n)));
    cheapest.map(|(i, _)| i)
}

#[cfg(test)]
mod tests;
