//! One step of the engine: plan, compute, draw, publish.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shoal_core::{Class, TokenId};
use shoal_kernels::lines::Lines;
use shoal_kernels::logits::BLOCK;

use crate::backend::{Backend, BackendError};
use crate::config::Limits;
use crate::metrics::{EngineMetrics, LoadMeter, StepStats};
use crate::request::{Finish, Load, Logprob, PageChange, SequenceKey, SequenceOutput};
use crate::sampler::{Draw, SampleError, Sampler};
use crate::scheduler::{BatchBuffer, Scheduler, Slot};
use crate::sequence::Sequence;
use crate::speculation::{PushedDraft, Speculator};

/// Where the time comes from.
pub type Clock = Box<dyn Fn() -> Instant + Send>;

/// Runs steps, one after the other.
pub(crate) struct Stepper {
    backend: Box<dyn Backend>,
    scheduler: Scheduler,
    speculator: Speculator,
    sampler: Sampler,
    batch: BatchBuffer,
    logits: Lines,
    vocab: usize,
    clock: Clock,
    meter: LoadMeter,
    metrics: EngineMetrics,
    output: Output,
    expected: Arc<AtomicU64>,
}

/// What has been made since the last publication.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// For the sink.
    pub(crate) sequences: Vec<SequenceOutput>,
    /// Sequences that ended.
    pub(crate) ended: Vec<SequenceKey>,
    /// Of the prefix cache.
    pub(crate) pages: Vec<PageChange>,
}

impl Output {
    fn farewell(&mut self, sequence: &Sequence, finish: Finish) {
        self.sequences.push(sequence.farewell(finish));
        self.ended.push(sequence.key);
    }
}

impl Stepper {
    pub(crate) fn new(
        backend: Box<dyn Backend>,
        limits: Limits,
        metrics: EngineMetrics,
        clock: Clock,
    ) -> Self {
        Self {
            scheduler: Scheduler::new(limits, backend.pages(), metrics.clone()),
            speculator: Speculator::new(metrics.clone()),
            sampler: Sampler::default(),
            batch: BatchBuffer::default(),
            logits: Lines::default(),
            vocab: backend.spec().vocab,
            backend,
            clock,
            meter: LoadMeter::new(),
            metrics,
            output: Output::default(),
            expected: Arc::default(),
        }
    }

    /// Microseconds that the running step is predicted to take; 0 between steps.
    pub(crate) fn expected(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.expected)
    }

    /// Whether no sequence is here.
    pub(crate) fn is_empty(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// Whether no sequence has anything to compute.
    pub(crate) fn rests(&self) -> bool {
        self.scheduler.rests()
    }

    /// The time until a sequence may be too late; zero if it is.
    pub(crate) fn until_deadline(&self) -> Option<Duration> {
        let deadline = self.scheduler.next_deadline()?;
        Some(deadline.saturating_duration_since(self.now()))
    }

    /// Sequences that hold pages.
    pub(crate) fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// The time now.
    pub(crate) fn now(&self) -> Instant {
        (self.clock)()
    }

    /// Takes a sequence. One that is complete already ends at once.
    pub(crate) fn submit(&mut self, sequence: Box<Sequence>) {
        match sequence.finish() {
            Some(finish) => self.output.farewell(&sequence, finish),
            None => self.scheduler.enqueue(sequence),
        }
    }

    /// Takes a draft that was made elsewhere for a running sequence; others have no use for it.
    pub(crate) fn draft(&mut self, key: SequenceKey, draft: PushedDraft) {
        if let Some(sequence) = self.scheduler.find(key) {
            sequence.drafting.push(draft);
        }
    }

    /// Tells a sequence what the one ahead of which it runs has, or ends it where there is no
    /// room for that.
    pub(crate) fn follow(&mut self, key: SequenceKey, base: usize, told: &[TokenId]) {
        if !self.scheduler.follow(key, base, told) {
            self.end(Finish::Preempted, |sequence| sequence.key == key);
        }
    }

    /// Ends every sequence that `is_out` says.
    pub(crate) fn end(&mut self, finish: Finish, is_out: impl FnMut(&Sequence) -> bool) {
        let output = &mut self.output;
        self.scheduler
            .retire(is_out, |sequence| output.farewell(sequence, finish));
    }

    /// What there is to publish, and the load to publish with it.
    pub(crate) fn output(&mut self) -> (&mut Output, Load) {
        let mut load = self.scheduler.load();
        self.meter.report(&mut load);
        load.draft_price = self.speculator.price();
        self.metrics.set_load(&load);
        let (_, kv) = self.scheduler.parts();
        kv.take_changes(&mut self.output.pages);
        (&mut self.output, load)
    }

    /// Whether the backend can run a step; where it has lost its pages, their sequences end.
    pub(crate) fn look(&mut self) -> Result<(), BackendError> {
        let result = self.backend.intact();
        if result.as_ref().is_err_and(BackendError::loses_pages) {
            self.lose_pages();
        }
        result
    }

    /// Makes the backend able to run a step again; `false` if it must be called again.
    pub(crate) fn recover(&mut self) -> Result<bool, BackendError> {
        self.backend.recover()
    }

    fn lose_pages(&mut self) {
        let output = &mut self.output;
        self.scheduler
            .lose_pages(|sequence| output.farewell(sequence, Finish::Preempted));
    }

    /// Runs one step. An error means that the backend can run no other before it has
    /// recovered, if ever; what failed for the moment only ends the sequences of the step.
    pub(crate) fn step(&mut self) -> Result<(), BackendError> {
        let start = self.now();
        let output = &mut self.output;
        self.scheduler
            .expire(start, |s| output.farewell(s, Finish::Deadline));
        let slack = self.scheduler.plan(start);
        let (running, kv) = self.scheduler.parts();
        self.speculator.plan(running, kv, slack);
        self.batch.fill(running);
        if self.batch.slots().is_empty() {
            return Ok(());
        }
        let logits = self.batch.logits() * self.vocab;
        self.logits.ensure(logits);
        let expected = self.scheduler.expected(&self.batch);
        self.expected
            .store(expected.as_micros() as u64, Ordering::Relaxed);
        let result = self
            .backend
            .step(&self.batch.batch(), &mut self.logits[..logits]);
        self.expected.store(0, Ordering::Relaxed);
        if let Err(error) = result {
            self.metrics.failed_steps.inc();
            if error.loses_pages() {
                self.lose_pages();
                return Err(error);
            }
            if error.class() == Class::Fatal {
                return Err(error);
            }
            tracing::error!(%error, sequences = self.batch.slots().len(), "a step failed");
            self.end(Finish::Preempted, |sequence| sequence.planned > 0);
            return Ok(());
        }
        let made = self.commit();
        self.scheduler.sweep();
        self.count(StepStats {
            time: self.now().saturating_duration_since(start),
            prefill_rows: self.batch.prefill_rows(),
            prefill_depth: self.batch.prefill_depth(),
            decode_rows: self.batch.decode_rows(),
            output_tokens: made,
        });
        Ok(())
    }

    /// Takes over what the backend computed; gives the number of output tokens made.
    fn commit(&mut self) -> usize {
        let now = self.now();
        let (running, kv) = self.scheduler.parts();
        let mut made = 0;
        for slot in self.batch.slots() {
            let sequence = &mut *running[slot.index];
            let mut rows = Rows {
                sampler: &mut self.sampler,
                logits: &mut self.logits,
                maxima: self.backend.maxima(),
                vocab: self.vocab,
            };
            let offset = sequence.output_len();
            let mut logprobs = Vec::new();
            let tokens = self.batch.tokens_of(slot);
            let drawn = rows
                .score(sequence, slot)
                .and_then(|()| rows.draw(sequence, slot, tokens, &mut logprobs, now));
            let failed = drawn.err();
            if let Some(error) = failed {
                let class = error.class();
                tracing::error!(%error, ?class, key = ?sequence.key, "a sequence failed");
            }
            // The last token has no row yet; rows of drafts that were wrong do not count.
            let with_rows = sequence.computed + slot.rows.len();
            sequence.computed = with_rows.min(sequence.tokens().len() - slot.drawing.len().min(1));
            sequence.cache_pages(kv);
            self.speculator.settle(sequence, offset);
            let output = SequenceOutput {
                key: sequence.key,
                offset: offset as u32,
                tokens: sequence.output_from(offset).to_vec(),
                logprobs,
                prompt_logprobs: sequence.take_scores(),
                finish: match failed {
                    Some(_) => Some(Finish::Preempted),
                    None => sequence.finish(),
                }
                .map(|finish| (finish, sequence.usage())),
            };
            made += output.tokens.len();
            if output.finish.is_some() {
                sequence.ended = true;
                self.output.ended.push(sequence.key);
            }
            let news = !output.tokens.is_empty() || !output.prompt_logprobs.is_empty();
            if news || output.finish.is_some() {
                self.output.sequences.push(output);
            }
        }
        made
    }

    fn count(&mut self, stats: StepStats) {
        self.scheduler.observe(&stats);
        self.speculator.observe(&stats);
        self.meter.add(&stats);
        let m = &self.metrics;
        m.step_time.observe(stats.time.as_secs_f64());
        let rows = stats.prefill_rows + stats.decode_rows;
        m.step_rows.observe(rows as f64);
        m.prefill_tokens.inc_by(stats.prefill_rows as u64);
        m.decode_tokens.inc_by(stats.output_tokens as u64);
    }
}

/// The logit rows of a step.
struct Rows<'a> {
    sampler: &'a mut Sampler,
    logits: &'a mut [f32],
    /// Of their blocks, if the backend keeps them.
    maxima: &'a [f32],
    vocab: usize,
}

impl<'a> Rows<'a> {
    /// The logits of a row, and the maxima of their blocks.
    fn row(&mut self, row: usize) -> (&mut [f32], &'a [f32], &mut Sampler) {
        let logits = &mut self.logits[row * self.vocab..][..self.vocab];
        let blocks = self.vocab.div_ceil(BLOCK);
        let maxima = self.maxima.get(row * blocks..(row + 1) * blocks);
        (logits, maxima.unwrap_or_default(), self.sampler)
    }

    fn logprob(&mut self, row: usize, token: TokenId, top: u32) -> Result<Logprob, SampleError> {
        let (logits, maxima, sampler) = self.row(row);
        sampler.logprob(logits, maxima, token, top)
    }

    /// Scores the prompt tokens that follow the slot's scoring rows.
    fn score(&mut self, sequence: &mut Sequence, slot: &Slot) -> Result<(), SampleError> {
        let top = sequence.scoring.prompt_top.unwrap_or(0);
        for row in slot.scoring.clone() {
            let token = sequence.tokens()[sequence.next_scored()];
            let score = self.logprob(row, token, top)?;
            sequence.push_score(score);
        }
        Ok(())
    }

    /// Draws a token from each of the slot's drawing rows, as long as what was drawn is what
    /// the next row took for granted. `tokens` are those of all the slot's rows.
    fn draw(
        &mut self,
        sequence: &mut Sequence,
        slot: &Slot,
        tokens: &[TokenId],
        logprobs: &mut Vec<Logprob>,
        now: Instant,
    ) -> Result<(), SampleError> {
        let assumed = &tokens[tokens.len() + 1 - slot.drawing.len().max(1)..];
        for (i, row) in slot.drawing.clone().enumerate() {
            let draw = Draw {
                sampling: &sequence.sampling,
                counts: &sequence.counts,
                masked: sequence.masked(),
                position: sequence.output_len() as u32,
            };
            let (logits, maxima, sampler) = self.row(row);
            let token = sampler.draw(logits, maxima, draw)?;
            if let Some(top) = sequence.scoring.output_top {
                logprobs.push(self.logprob(row, token, top)?);
            }
            sequence.push(token, now);
            if sequence.finish().is_some() || assumed.get(i) != Some(&token) {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl Stepper {
    /// The output of a sequence so far.
    pub(crate) fn output_of(&self, key: SequenceKey) -> Vec<TokenId> {
        let mut sequences = self.scheduler.sequences();
        let sequence = sequences.find(|s| s.key == key).expect("a sequence");
        sequence.output_from(0).to_vec()
    }

    /// Checks the books of the page pool against what the sequences hold.
    pub(crate) fn check(&self) {
        let held = self.scheduler.sequences().map(|s| s.pages.as_slice());
        self.scheduler.kv().check(held);
    }
}
