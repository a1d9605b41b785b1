//! Which rows a step computes.
//!
//! One budget of rows per step. Running sequences come first, in order of rank: one decode row
//! each, then chunks of prompts. What is left goes to waiting sequences, in order of rank. A
//! sequence is admitted with the pages of all its known tokens, so only decode rows can find
//! the pool empty; then the running sequence of the last rank loses its pages, waits at its
//! old rank, and is computed again. A step that took pages away admits nobody. While answers that
//! clients read already are computed again, steps may be longer than they should be.
//!
//! Tokens do not depend on any of this: it decides when a row is computed, never how.

mod batch;
mod chunk;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shoal_core::TokenId;

pub(crate) use self::batch::{BatchBuffer, Slot};
use self::chunk::{Allowance, StepTimeModel};
use crate::config::Limits;
use crate::kv::KvPages;
use crate::metrics::{EngineMetrics, StepStats};
use crate::request::{Load, SequenceKey};
use crate::sequence::{Rank, Sequence};
use crate::speculation::Slack;

/// Waiting sequences that a step may pass over because another one computes their prefix.
const MAX_DEFERRED: usize = 32;

/// So many times the target is what a step may take while streams are broken off.
const CATCH_UP: u32 = 2;

/// Why a waiting sequence was not admitted.
enum Refusal {
    /// There is no page for it.
    Pages,
    /// A running sequence is about to compute its next page; it waits to share that.
    Deferred,
}

/// What a step has left to give.
struct Budget {
    rows: usize,
    prefill: usize,
    /// What prompt rows may take of the time.
    allowance: Allowance,
    logits: usize,
}

/// All sequences, and the pages they share.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    kv: KvPages,
    /// By rank.
    #[expect(clippy::vec_box, reason = "sequences change lists by pointer")]
    running: Vec<Box<Sequence>>,
    waiting: BTreeMap<Rank, Box<Sequence>>,
    /// Sum over the waiting.
    waiting_uncached: u64,
    /// No deadline is earlier.
    next_deadline: Option<Instant>,
    /// The last plan had no row, and nothing has changed since.
    stuck: bool,
    model: StepTimeModel,
    metrics: EngineMetrics,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits, pages: u32, metrics: EngineMetrics) -> Self {
        Self {
            kv: KvPages::new(pages, limits.prefix_cache),
            running: Vec::with_capacity(limits.max_running),
            waiting: BTreeMap::new(),
            waiting_uncached: 0,
            next_deadline: None,
            stuck: false,
            model: StepTimeModel::default(),
            limits,
            metrics,
        }
    }

    /// Whether there is no sequence.
    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Whether there is nothing to do: those that run ahead of others may all be far enough, and
    /// hold the pages that others wait for.
    pub(crate) fn rests(&self) -> bool {
        let idle = || self.running.iter().all(|sequence| sequence.rests());
        self.stuck || self.waiting.is_empty() && idle()
    }

    /// When a sequence ends even if nothing else happens; at the earliest.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// Tells a sequence what the one ahead of which it runs has. False: there is no page for it.
    pub(crate) fn follow(&mut self, key: SequenceKey, base: usize, told: &[TokenId]) -> bool {
        self.stuck = false;
        if let Some(sequence) = self.running.iter_mut().find(|s| s.key == key) {
            sequence.follow(base, told);
            while sequence.pages.len() < sequence.pages_needed() {
                let Some(page) = self.kv.allocate() else {
                    return false;
                };
                sequence.pages.push(page);
            }
        } else if let Some(sequence) = self.waiting.values_mut().find(|s| s.key == key) {
            sequence.follow(base, told);
        }
        true
    }

    /// Sequences that hold pages.
    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// The running sequences and the pages, for the step to commit its results.
    pub(crate) fn parts(&mut self) -> (&mut [Box<Sequence>], &mut KvPages) {
        (&mut self.running, &mut self.kv)
    }

    /// Puts a sequence into the queue.
    pub(crate) fn enqueue(&mut self, mut sequence: Box<Sequence>) {
        self.stuck = false;
        let cached = self.kv.matches(sequence.reusable()).count() * shoal_core::PAGE_TOKENS;
        sequence.uncached = sequence.prompt_len().saturating_sub(cached);
        self.waiting_uncached += sequence.uncached as u64;
        if let Some(deadline) = sequence.deadline {
            self.next_deadline = Some(self.next_deadline.map_or(deadline, |d| d.min(deadline)));
        }
        self.waiting.insert(sequence.rank, sequence);
    }

    /// Takes out every sequence that `is_out` says, after showing it to `farewell`.
    pub(crate) fn retire(
        &mut self,
        mut is_out: impl FnMut(&Sequence) -> bool,
        mut farewell: impl FnMut(&Sequence),
    ) {
        self.stuck = false;
        let (kv, uncached) = (&mut self.kv, &mut self.waiting_uncached);
        self.running.retain_mut(|sequence| {
            let out = is_out(sequence);
            if out {
                farewell(sequence);
                kv.release(&mut sequence.pages);
            }
            !out
        });
        self.waiting.retain(|_, sequence| {
            let out = is_out(sequence);
            if out {
                farewell(sequence);
                *uncached -= sequence.uncached as u64;
            }
            !out
        });
    }

    /// Takes out every sequence that holds pages, after showing it to `farewell`, and forgets
    /// what is cached: the pages are lost.
    pub(crate) fn lose_pages(&mut self, farewell: impl FnMut(&Sequence)) {
        self.retire(|sequence| !sequence.pages.is_empty(), farewell);
        self.kv.clear();
    }

    /// Takes out the sequences whose deadline has passed.
    pub(crate) fn expire(&mut self, now: Instant, farewell: impl FnMut(&Sequence)) {
        if self.next_deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let late = |sequence: &Sequence| sequence.deadline.is_some_and(|d| d <= now);
        self.retire(late, farewell);
        let waiting = self.waiting.values();
        let deadlines = self
            .running
            .iter()
            .chain(waiting)
            .filter_map(|s| s.deadline);
        self.next_deadline = deadlines.min();
    }

    /// Takes out the running sequences marked as ended.
    pub(crate) fn sweep(&mut self) {
        let kv = &mut self.kv;
        self.running.retain_mut(|sequence| {
            if sequence.ended {
                kv.release(&mut sequence.pages);
            }
            !sequence.ended
        });
    }

    /// Decides the rows of the next step: `planned` of each running sequence. Gives what is left
    /// for drafts.
    pub(crate) fn plan(&mut self, now: Instant) -> Slack {
        // Whoever gives way below begins to wait, and sets it to false.
        self.stuck = true;
        let mut drafted = 0;
        for sequence in &mut self.running {
            sequence.planned = 0;
            drafted += sequence.drafting.rows().len();
        }
        let short = self.plan_decodes();
        let decodes: usize = self.running.iter().map(|s| s.planned).sum();
        let mut budget = Budget {
            rows: self.limits.step_rows - decodes,
            prefill: self.limits.prefill_chunk,
            allowance: self.allowance(decodes, drafted),
            logits: self.limits.logit_rows - decodes,
        };
        for sequence in &mut self.running {
            if !sequence.is_decoding() {
                plan_prefill(sequence, &mut budget);
            }
        }
        if !short {
            self.admit(&mut budget, now);
        }
        self.stuck &= self.running.iter().all(|s| s.planned == 0);
        let prefill = self.running.iter().filter(|s| !s.is_decoding());
        let prefill = prefill.map(|s| s.planned).sum();
        let rows = match prefill {
            _ if short => 0,
            0 => budget.rows,
            _ => budget.rows.min(budget.allowance.draft_rows()),
        };
        Slack {
            rows,
            logits: budget.logits,
            prefill,
            row_seconds: self.model.draft_row(),
        }
    }

    /// What prompt rows may take of a step. Where streams are broken off, the others have longer
    /// steps for a while, and no time is kept for drafts but the least.
    fn allowance(&self, decodes: usize, drafted: usize) -> Allowance {
        let target = self.limits.itl_target;
        let mut next = self.running.iter().chain(self.waiting.values().next());
        if decodes == 0 {
            Allowance::ANY
        } else if next.any(|sequence| sequence.is_broken_off()) {
            self.model.allowance(decodes, 0, target * CATCH_UP)
        } else {
            self.model.allowance(decodes, drafted, target)
        }
    }

    /// A sequence that holds pages.
    pub(crate) fn find(&mut self, key: SequenceKey) -> Option<&mut Sequence> {
        let found = self.running.iter_mut().find(|s| s.key == key);
        found.map(|sequence| &mut **sequence)
    }

    /// What a step of such a batch is predicted to take.
    pub(crate) fn expected(&self, batch: &BatchBuffer) -> Duration {
        self.model.expected(
            batch.decode_rows(),
            batch.prefill_rows(),
            batch.prefill_depth(),
        )
    }

    /// Learns from a finished step.
    pub(crate) fn observe(&mut self, stats: &StepStats) {
        self.model.add(stats);
    }

    /// Counts of the load; the meter adds the rates.
    pub(crate) fn load(&self) -> Load {
        let (base, row) = self.model.decode_step().unwrap_or_default();
        Load {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            waiting_uncached_tokens: self.waiting_uncached,
            kv_usage: self.kv.usage(),
            step_base_ms: base * 1e3,
            step_row_ms: row * 1e3,
            prompt_row_ms: self.model.settled_prompt_row().unwrap_or_default() * 1e3,
            ..Load::default()
        }
    }

    /// Plans one row for each decoding sequence, and says whether pages ran out. A sequence
    /// that gets no page although it is the last keeps what it has and sits the step out.
    fn plan_decodes(&mut self) -> bool {
        let mut short = false;
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].is_decoding() && !self.running[at].rests() {
                let fits = loop {
                    let sequence = &mut self.running[at];
                    if sequence.pages.len() >= sequence.pages_needed() {
                        break true;
                    }
                    if let Some(page) = self.kv.allocate() {
                        sequence.pages.push(page);
                        continue;
                    }
                    short = true;
                    if at + 1 == self.running.len() {
                        break false;
                    }
                    self.preempt_last();
                };
                self.running[at].planned = usize::from(fits);
            }
            at += 1;
        }
        short
    }

    /// Sends the running sequence of the last rank back to the queue.
    fn preempt_last(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            sequence.preempt(&mut self.kv);
            self.metrics.preemptions.inc();
            self.enqueue(sequence);
        }
    }

    fn admit(&mut self, budget: &mut Budget, now: Instant) {
        let mut deferred = 0;
        let mut after = None;
        while budget.rows > 0 && budget.prefill > 0 && deferred < MAX_DEFERRED {
            let Some((&rank, sequence)) = self.waiting_after(after) else {
                return;
            };
            let full = self.running.len() == self.limits.max_running;
            let refusal = if full {
                Some(Refusal::Pages)
            } else {
                self.refusal(sequence)
            };
            match refusal {
                None => {}
                Some(Refusal::Deferred) => {
                    deferred += 1;
                    after = Some(rank);
                    continue;
                }
                Some(Refusal::Pages) => {
                    if self.makes_room(sequence, full) {
                        self.preempt_last();
                    }
                    return;
                }
            }
            let Some(mut sequence) = self.waiting.remove(&rank) else {
                return;
            };
            self.waiting_uncached -= sequence.uncached as u64;
            self.take_pages(&mut sequence, now);
            plan_prefill(&mut sequence, budget);
            let at = self.running.partition_point(|other| other.rank < rank);
            self.running.insert(at, sequence);
        }
    }

    fn waiting_after(&self, after: Option<Rank>) -> Option<(&Rank, &Sequence)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        let mut range = self.waiting.range((from, Unbounded));
        range.next().map(|(rank, sequence)| (rank, &**sequence))
    }

    /// Whether a waiting sequence can be admitted now. One page for each running sequence
    /// stays free, lest the next decode rows take the new one's pages away again.
    fn refusal(&self, sequence: &Sequence) -> Option<Refusal> {
        let prefix = sequence.reusable();
        let (mut hits, mut revived) = (0, 0);
        for page in self.kv.matches(prefix) {
            hits += 1;
            revived += usize::from(self.kv.is_unheld(page));
        }
        if let Some(&next) = prefix.hashes.get(hits) {
            let computing = self
                .running
                .iter()
                .take_while(|other| other.rank < sequence.rank)
                .any(|other| other.will_compute(hits, next));
            if computing && self.limits.prefix_cache {
                return Some(Refusal::Deferred);
            }
        }
        let needed = sequence.pages_needed() - hits + self.running.len();
        (needed + revived > self.kv.available()).then_some(Refusal::Pages)
    }

    /// Whether the last running sequence should give way to this waiting one: if it is of lower
    /// priority, and all such sequences together hold enough.
    fn makes_room(&self, sequence: &Sequence, full: bool) -> bool {
        let lower = || {
            let last_first = self.running.iter().rev();
            last_first.take_while(|other| {
                other.priority < sequence.priority && other.rank > sequence.rank
            })
        };
        let given: usize = lower().map(|other| other.pages.len()).sum();
        let kept = self.running.len() - lower().count();
        let enough = self.kv.available() + given >= sequence.pages_needed() + kept;
        lower().next().is_some() && (full || enough)
    }

    /// Gives an admitted sequence its pages: cached ones first.
    fn take_pages(&mut self, sequence: &mut Sequence, now: Instant) {
        let mut pages = std::mem::take(&mut sequence.pages);
        let prefix = sequence.reusable();
        pages.extend(self.kv.matches(prefix));
        for &page in &pages {
            self.kv.hold(page);
        }
        let hits = pages.len();
        let fresh = sequence.pages_needed() - hits;
        pages.extend((0..fresh).map_while(|_| self.kv.allocate()));
        sequence.pages = pages;
        if sequence.is_new() {
            let queries = sequence.prompt_len() as u64;
            let hit_tokens = (hits * shoal_core::PAGE_TOKENS) as u64;
            self.metrics.prefix_queries.inc_by(queries);
            self.metrics.prefix_hits.inc_by(hit_tokens);
        }
        let first = sequence.is_new();
        sequence.admit(hits, now);
        if let Some(queued) = sequence.queued().filter(|_| first) {
            self.metrics.queue_time.observe(queued.as_secs_f64());
        }
    }
}

/// Plans as many known tokens of a sequence, all of its prompt or all of its output, as the
/// budget holds. Rows whose logits are wanted are limited too. Where time is what ended a chunk,
/// no other begins.
fn plan_prefill(sequence: &mut Sequence, budget: &mut Budget) {
    let rows = sequence.pending_of_a_role();
    let in_time = budget.allowance.rows(sequence.computed);
    let mut rows = rows.min(budget.rows).min(budget.prefill).min(in_time);
    if sequence.scores_missing() {
        rows = rows.min(budget.logits);
    } else if budget.logits == 0 && sequence.samples_after(rows) {
        rows -= 1;
    }
    sequence.planned = rows;
    budget.rows -= rows;
    budget.prefill -= rows;
    budget.allowance.take(rows, sequence.computed);
    if rows == in_time {
        budget.prefill = 0;
    }
    budget.logits -= sequence.scoring_rows(rows).len() + usize::from(sequence.samples_after(rows));
}

#[cfg(test)]
impl Scheduler {
    /// The page pool, for checks.
    pub(crate) fn kv(&self) -> &KvPages {
        &self.kv
    }

    /// Every sequence, running first.
    pub(crate) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let waiting = self.waiting.values();
        self.running.iter().chain(waiting).map(|s| &**s)
    }
}
