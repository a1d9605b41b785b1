//! Which draft rows a step has: the most useful ones, while they are worth their price.
//!
//! A step of `B` decoding sequences and `m` draft rows takes `T(B, m)` seconds, as measured,
//! and makes `B + s_1 + … + s_m` tokens, if the `i`-th best row is reached and right with the
//! chance `s_i`. The number of rows is the one that makes the most tokens per second. Chances
//! never rise along a draft, so taking the best rows first takes the beginnings of drafts.

use shoal_core::{PAGE_TOKENS, Speculation};

use super::curve::{EDGES, Fit, StepCurve};
use super::hazard::Hazards;
use crate::kv::KvPages;
use crate::metrics::{EngineMetrics, StepStats};
use crate::sequence::Sequence;

/// Drafts must promise so much more than none: what is measured wavers.
const MARGIN: f64 = 1.02;
/// Of the steps without drafts, though there are some, every so many verify a few all the same:
/// prices change, and only what is computed is measured.
const PROBE: u64 = 64;
/// Draft rows of such a step.
const PROBE_ROWS: usize = 2;
/// While no row has a chance, drafters are asked in every so many steps only.
const GLANCE: u64 = 8;
/// No draft takes pages while fewer than this many per running sequence can be had.
const SPARE_PAGES: usize = 2;

/// What a planned step has left for drafts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slack {
    pub(crate) rows: usize,
    pub(crate) logits: usize,
    /// Prompt rows of the step.
    pub(crate) prefill: usize,
    /// Seconds of a draft row beside prompt rows, where they are known.
    pub(crate) row_seconds: Option<f64>,
}

/// Plans draft rows and learns from them.
#[derive(Debug)]
pub(crate) struct Speculator {
    hazards: Hazards,
    curve: StepCurve,
    metrics: EngineMetrics,
    steps: u64,
    /// Steps without draft rows since the last one with some, where there were drafts.
    barren: u64,
    /// Of the step being planned: the chance of each draft row and its sequence.
    candidates: Vec<(f32, usize)>,
    counts: Vec<usize>,
    decodes: usize,
    rows: usize,
    /// The chance that one more row must have; above 1, none has it.
    price: f64,
}

impl Speculator {
    pub(crate) fn new(metrics: EngineMetrics) -> Self {
        Self {
            hazards: Hazards::default(),
            curve: StepCurve::default(),
            metrics,
            steps: 0,
            barren: 0,
            candidates: Vec::new(),
            counts: Vec::new(),
            decodes: 0,
            rows: 0,
            price: 0.0,
        }
    }

    /// The chance that one more draft row must have had in the last step.
    pub(crate) fn price(&self) -> f64 {
        self.price
    }

    /// Plans draft rows beside the decode rows of `running`, within what the step has left.
    pub(crate) fn plan(&mut self, running: &mut [Box<Sequence>], kv: &mut KvPages, slack: Slack) {
        running.iter_mut().for_each(|s| s.drafting.reset());
        self.decodes = running.iter().filter(|s| s.decodes()).count();
        self.rows = 0;
        if self.decodes == 0 {
            return;
        }
        self.steps += 1;
        self.counts.clear();
        self.counts.resize(running.len(), 0);
        self.candidates.clear();
        let most = slack.rows.min(slack.logits);
        let scarce = kv.available() < SPARE_PAGES * running.len();
        let asks = self.price < 1.0 || self.steps.is_multiple_of(GLANCE);
        let mut fixed = 0;
        for (index, sequence) in running.iter_mut().enumerate() {
            let mode = sequence.drafting.mode();
            let wanted = asks || matches!(mode, Speculation::Fixed(_));
            if !sequence.decodes() || scarce || !wanted || !sequence.propose() {
                continue;
            }
            let tenant = *sequence.namespace();
            let survivals = sequence.drafting.choose(self.hazards.of(&tenant));
            match mode {
                Speculation::Auto => self.candidates.extend(survivals.map(|s| (s, index))),
                Speculation::Fixed(rows) => {
                    drop(survivals);
                    let rows = (rows as usize).min(sequence.drafting.available());
                    self.counts[index] = rows.min(most - fixed);
                    fixed += self.counts[index];
                }
                Speculation::Off => {}
            }
        }
        let admitted = self.admit(fixed, most - fixed, slack);
        for &(_, index) in &self.candidates[..admitted] {
            self.counts[index] += 1;
        }
        let reserve = running.len();
        for (sequence, &count) in running.iter_mut().zip(&self.counts) {
            self.rows += take_rows(sequence, count, reserve, kv);
        }
    }

    /// How many of the candidates are worth it, the best ones first.
    fn admit(&mut self, fixed: usize, most: usize, slack: Slack) -> usize {
        let Some(mut fit) = self.curve.fit(self.decodes) else {
            // The first step of its kind: measured alone.
            self.price = 0.0;
            return 0;
        };
        if slack.prefill > 0 {
            let Some(row) = slack.row_seconds else {
                return 0;
            };
            let alone = fit.seconds[0];
            fit.seconds = EDGES.map(|rows| alone + rows as f64 * row);
        }
        self.candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        let survivals = self.candidates.iter().map(|c| f64::from(c.0));
        let choice = best_rows(&fit, self.decodes, fixed, most, survivals);
        self.price = choice.price;
        let found = self.candidates.len().min(most);
        if choice.rows > 0 || found == 0 {
            self.barren = 0;
            return choice.rows;
        }
        self.barren += 1;
        if self.barren.is_multiple_of(PROBE) {
            return PROBE_ROWS.min(found);
        }
        0
    }

    /// Learns what became of a sequence's draft: `made` are the tokens of the step.
    pub(crate) fn settle(&mut self, sequence: &mut Sequence, offset: usize) {
        let settled = sequence.settle_draft(&mut self.hazards, offset);
        if settled.rows > 0 {
            self.metrics.drafts.settle(settled);
        }
    }

    /// Learns what the step took.
    pub(crate) fn observe(&mut self, stats: &StepStats) {
        if self.decodes == 0 || stats.prefill_rows > 0 {
            return;
        }
        let seconds = stats.time.as_secs_f64();
        if self.rows > 0
            && let Some(fit) = self.curve.fit(self.decodes)
        {
            let plain = fit.seconds[0] * stats.output_tokens as f64 / self.decodes as f64;
            self.metrics.drafts.saved(plain - seconds);
        }
        self.curve.add(self.decodes, self.rows, seconds);
    }
}

/// A number of draft rows, and the price of one more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) rows: usize,
    pub(super) price: f64,
}

/// The number of rows, of those that are measured, that makes the most tokens per second.
/// `survivals` never rise; `fixed` rows are there already.
pub(super) fn best_rows(
    fit: &Fit,
    decodes: usize,
    fixed: usize,
    most: usize,
    survivals: impl Iterator<Item = f64>,
) -> Choice {
    let seconds = |rows: usize| {
        let above = EDGES.partition_point(|&edge| edge < rows);
        fit.seconds[above.min(EDGES.len() - 1)]
    };
    let mut tokens = decodes as f64;
    let plain = tokens / seconds(fixed);
    let (mut rows, mut rate) = (0, plain * MARGIN);
    for (i, survival) in survivals.take(most).enumerate() {
        tokens += survival;
        let edge = EDGES.binary_search(&(fixed + i + 1)).is_ok();
        if edge && tokens / seconds(fixed + i + 1) > rate {
            (rows, rate) = (i + 1, tokens / seconds(fixed + i + 1));
        }
    }
    let rate = if rows == 0 { plain } else { rate };
    // The next edge is what one more row leads to; it is shared by all rows up to there.
    let at = EDGES.partition_point(|&edge| edge < fixed + rows);
    let price = match (EDGES.get(at), EDGES.get(at + 1)) {
        (Some(&here), Some(&next)) => {
            rate * (fit.seconds[at + 1] - fit.seconds[at]) / (next - here) as f64
        }
        _ => f64::INFINITY,
    };
    Choice { rows, price }
}

/// Gives a sequence its draft rows, as far as its pages reach or pages are left over.
fn take_rows(sequence: &mut Sequence, rows: usize, reserve: usize, kv: &mut KvPages) -> usize {
    if rows == 0 {
        return 0;
    }
    let tokens = sequence.tokens().len();
    while sequence.pages.len() * PAGE_TOKENS < tokens + rows && kv.available() > reserve {
        match kv.allocate() {
            Some(page) => sequence.pages.push(page),
            None => break,
        }
    }
    let room = sequence.pages.len() * PAGE_TOKENS - tokens;
    sequence.drafting.set_rows(rows.min(room));
    sequence.drafting.rows().len()
}
