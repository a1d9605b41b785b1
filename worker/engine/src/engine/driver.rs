//! Who runs an engine's steps: its thread, or a caller by hand.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use shoal_core::Class;

use super::{Inbox, Shared, Told, lock};
use crate::backend::BackendError;
use crate::request::{Finish, StepSink};
use crate::step::Stepper;

/// What a [turn](Driver::turn) came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A step was made and published.
    Stepped,
    /// There was nothing to do.
    Idle,
    /// The engine was stopped or is broken, and every sequence has ended.
    Ended,
}

/// Runs an engine's steps.
pub struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) stepper: Stepper,
    pub(super) sink: Box<dyn StepSink>,
}

impl Driver {
    /// Runs until the end; the thread parks while there is nothing to do.
    pub(super) fn run(mut self) {
        loop {
            match self.turn() {
                Turn::Stepped => {}
                Turn::Idle => self.wait(),
                Turn::Ended => return,
            }
        }
    }

    /// Takes the commands that have come and makes a step, where there is anything to do.
    pub fn turn(&mut self) -> Turn {
        // A panicking backend must not leave its sequences without an end.
        let result = catch_unwind(AssertUnwindSafe(|| self.step()));
        let reason = match result {
            Ok(Ok(true)) => return Turn::Stepped,
            Ok(Ok(false)) => return Turn::Idle,
            Ok(Err(reason)) => reason,
            Err(_) => "it panicked".into(),
        };
        let mut inbox = lock(&self.shared.inbox);
        inbox.stopped = Some(reason);
        let submitted = std::mem::take(&mut inbox.submitted);
        drop(inbox);
        for sequence in submitted {
            self.stepper.submit(sequence);
        }
        self.stepper.end(Finish::Preempted, |_| true);
        self.publish();
        Turn::Ended
    }

    fn has_work(&self, inbox: &Inbox) -> bool {
        // Whoever drains waits for those that rest, too.
        let drains = inbox.drain.is_some() && !self.stepper.is_empty();
        let late = || self.stepper.until_deadline() == Some(Duration::ZERO);
        !self.stepper.rests() || !inbox.is_empty() || drains || late()
    }

    fn wait(&self) {
        let inbox = lock(&self.shared.inbox);
        let idle = |inbox: &mut Inbox| !self.has_work(inbox);
        let most = self.stepper.until_deadline().unwrap_or(Duration::MAX);
        let woken = self.shared.wake.wait_timeout_while(inbox, most, idle);
        drop(woken.unwrap_or_else(PoisonError::into_inner));
    }

    /// False: there was nothing to do. An error says why it is the last.
    fn step(&mut self) -> Result<bool, String> {
        let mut inbox = lock(&self.shared.inbox);
        if !self.has_work(&inbox) {
            return Ok(false);
        }
        if inbox.stop {
            return Err("it was stopped".into());
        }
        let submitted = std::mem::take(&mut inbox.submitted);
        let cancelled = std::mem::take(&mut inbox.cancelled);
        let drafts = std::mem::take(&mut inbox.drafts);
        let told = std::mem::take(&mut inbox.told);
        let drain = inbox.drain;
        let check = std::mem::take(&mut inbox.check);
        drop(inbox);

        for sequence in submitted {
            self.stepper.submit(sequence);
        }
        if !cancelled.is_empty() {
            self.stepper
                .end(Finish::Cancelled, |s| cancelled.contains(&s.key));
        }
        for (key, draft) in drafts {
            self.stepper.draft(key, draft);
        }
        for (key, Told { base, tokens }) in told {
            self.stepper.follow(key, base, &tokens);
        }
        if drain.is_some() {
            self.stepper.end(Finish::Preempted, |s| s.leads());
        }
        let deadline = drain.and_then(|drain| drain.deadline);
        if deadline.is_some_and(|deadline| deadline <= self.stepper.now()) {
            self.stepper.end(Finish::Preempted, |_| true);
        }
        let result = match check {
            true => self.stepper.look(),
            false => Ok(()),
        };
        let result = result.and_then(|()| self.stepper.step());
        self.publish();
        result
            .or_else(|error| self.recover(error))
            .map_err(|error| {
                tracing::error!(%error, "the backend is broken; the engine stops");
                error.to_string()
            })?;
        Ok(true)
    }

    /// After a step that failed: goes on if that can be.
    fn recover(&mut self, error: BackendError) -> Result<(), BackendError> {
        if error.class() == Class::Fatal {
            return Err(error);
        }
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the backend has lost its pages"
        );
        while !self.stepper.recover()? {
            if self.turn_away() {
                break;
            }
        }
        Ok(())
    }

    /// Ends every sequence, while nobody knows how long the backend will be unable to run one:
    /// others may. Whether the engine is to stop.
    fn turn_away(&mut self) -> bool {
        let mut inbox = lock(&self.shared.inbox);
        let submitted = std::mem::take(&mut inbox.submitted);
        let stop = inbox.stop;
        drop(inbox);
        for sequence in submitted {
            self.stepper.submit(sequence);
        }
        self.stepper.end(Finish::Preempted, |_| true);
        self.publish();
        stop
    }

    /// Publishes what has been made, and forgets the sequences that ended.
    fn publish(&mut self) {
        let running = self.stepper.running();
        let (output, load) = self.stepper.output();
        *lock(&self.shared.load) = load;
        let step = self.shared.steps.fetch_add(1, Ordering::Relaxed) + 1;
        self.sink.publish(step, &mut output.sequences, &load);
        output.sequences.clear();
        if !output.pages.is_empty() {
            self.sink.cached(&output.pages);
            output.pages.clear();
        }
        let mut inbox = lock(&self.shared.inbox);
        inbox.running = running;
        for key in output.ended.drain(..) {
            inbox.live.remove(&key);
        }
    }
}
