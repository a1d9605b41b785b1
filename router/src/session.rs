//! The hot stream between this router and one worker.
//!
//! A worker sends one frame per engine step with the new tokens of all sequences. The link
//! task spreads them over [`Slot`]s and never waits: what a client has not fetched yet is
//! merged into one output, which the sequence's `max_tokens` bounds. Dropping an
//! [`Attachment`] cancels its sequence at the worker.

mod slot;
mod table;

use std::{
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::Stream;
use prost::Message as _;
use shoal_core::TokenId;
use shoal_proto::{
    MAX_ROUTER_FRAME,
    worker::{
        Cancel, Draft, Finish, Follow, Ping, Rejected, RouterFrame, StepOutput, Submit,
        router_frame::Frame,
    },
};
use tokio::{
    sync::{Notify, mpsc},
    time::MissedTickBehavior,
};

pub(crate) use self::{slot::Event, table::Placed};
use self::{
    slot::Slot,
    table::{Entry, Table},
};
use crate::admission::Permit;

/// Submissions that wait for the worker's flow control.
const OUTBOUND: usize = 64;
/// Bytes of a frame around its submission: a tag and a length.
const ENVELOPE: usize = 8;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One open stream to a worker.
#[derive(Debug)]
pub(crate) struct Session {
    table: Mutex<Table>,
    outbound: mpsc::Sender<Submit>,
    /// Something changed that the outgoing stream must see.
    wake: Notify,
}

/// Why a sequence is not submitted.
#[derive(Debug)]
pub(crate) enum NotSubmitted {
    /// The session is over; the permit comes back.
    Closed(Option<Permit>),
    /// It would end the session for all others.
    TooLarge,
}

impl Session {
    /// A session and the frames that it sends.
    pub(crate) fn new(
        ping_interval: Duration,
    ) -> (Arc<Self>, impl Stream<Item = RouterFrame> + Send + 'static) {
        let (outbound, submissions) = mpsc::channel(OUTBOUND);
        let session = Arc::new(Self {
            table: Mutex::default(),
            outbound,
            wake: Notify::new(),
        });
        let frames = outgoing(session.clone(), submissions, ping_interval);
        (session, frames)
    }

    /// Sends a sequence to the worker, which has to prefill `uncached` of its tokens.
    /// Cancel-safe: dropping the future withdraws it.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        submit: Submit,
        uncached: u64,
        permit: Option<Permit>,
    ) -> Result<Attachment, NotSubmitted> {
        let attachment = self.open(&submit, uncached, permit)?;
        match self.outbound.send(submit).await {
            Ok(()) => Ok(attachment),
            Err(_) => Err(NotSubmitted::Closed(attachment.take_permit())),
        }
    }

    /// Sends a sequence that runs ahead of another, unless that has to wait.
    pub(crate) fn lead(self: &Arc<Self>, submit: Submit) -> Option<Attachment> {
        let attachment = self.open(&submit, 0, None).ok()?;
        self.outbound.try_send(submit).ok()?;
        Some(attachment)
    }

    /// Enters a sequence into the table.
    fn open(
        self: &Arc<Self>,
        submit: &Submit,
        uncached: u64,
        permit: Option<Permit>,
    ) -> Result<Attachment, NotSubmitted> {
        if submit.encoded_len() > MAX_ROUTER_FRAME - ENVELOPE {
            return Err(NotSubmitted::TooLarge);
        }
        let (sequence, attempt) = (submit.sequence, submit.attempt);
        let most = submit.stopping.as_ref().map_or(0, |s| s.max_tokens) as usize;
        let room = match submit.lead {
            None => most.saturating_sub(submit.resume.len()),
            // It makes tokens anew as often as it was wrong.
            Some(_) => usize::MAX,
        };
        let mut table = lock(&self.table);
        if table.closed {
            return Err(NotSubmitted::Closed(permit));
        }
        let slot = Arc::new(Slot::new(attempt, room, permit));
        table.unstarted += uncached;
        table
            .entries
            .insert(sequence, Entry::new(slot.clone(), uncached));
        drop(table);
        Ok(Attachment {
            session: self.clone(),
            sequence,
            slot,
        })
    }

    /// Changes what is to be sent about a sequence, if it is still here.
    fn note(&self, sequence: u64, attempt: u32, note: impl FnOnce(&mut Entry)) {
        let mut table = lock(&self.table);
        let Some(entry) = table.attempt(sequence, attempt) else {
            return;
        };
        let first = entry.sent && !entry.is_noted();
        note(entry);
        if first {
            table.noted.push(sequence);
        }
        drop(table);
        self.wake.notify_one();
    }

    /// What is to be sent before anything else: cancellations, drafts, and what sequences are
    /// told that the worker has. None: the session is over.
    fn notes(&self) -> Option<Vec<Frame>> {
        let mut table = lock(&self.table);
        if table.closed {
            return None;
        }
        let Table {
            entries,
            cancels,
            noted,
            ..
        } = &mut *table;
        let mut frames: Vec<_> = cancels.drain(..).map(Frame::Cancel).collect();
        for sequence in noted.drain(..) {
            if let Some(entry) = entries.get_mut(&sequence) {
                frames.extend(entry.draft.take().map(Frame::Draft));
                frames.extend(entry.follow.take().map(Frame::Follow));
            }
        }
        Some(frames)
    }

    /// Spreads the output of one engine step.
    pub(crate) fn deliver(&self, step: StepOutput) {
        let mut table = lock(&self.table);
        let table = &mut *table;
        for output in step.sequences {
            let (sequence, attempt) = (output.sequence, output.attempt);
            let Some(entry) = table.attempt(sequence, attempt) else {
                continue;
            };
            let started = std::mem::take(&mut entry.unstarted);
            let last = output.finish != Finish::Unspecified as i32;
            let sound = entry.slot.push(output);
            if !sound {
                entry.slot.end(Event::Lost);
            }
            table.unstarted -= started;
            if !sound {
                tracing::warn!(sequence, "the worker sent more than max_tokens");
                table.cancels.push(Cancel { sequence, attempt });
                self.wake.notify_one();
            }
            if last || !sound {
                table.remove(sequence, attempt);
            }
        }
    }

    /// The worker does not take a sequence.
    pub(crate) fn reject(&self, rejected: Rejected) {
        let reason = rejected.reason();
        let entry = lock(&self.table).remove(rejected.sequence, rejected.attempt);
        if let Some(entry) = entry {
            entry.slot.end(Event::Rejected(reason, rejected.message));
        }
    }

    /// Ends every sequence as lost; further submissions fail.
    pub(crate) fn close(&self) {
        let entries = {
            let mut table = lock(&self.table);
            table.closed = true;
            table.unstarted = 0;
            table.cancels = Vec::new();
            std::mem::take(&mut table.entries)
        };
        for entry in entries.into_values() {
            entry.slot.end(Event::Lost);
        }
        self.wake.notify_one();
    }

    /// Ends every sequence as lost, here and at the worker; the session goes on.
    pub(crate) fn evict(&self) {
        let entries = {
            let mut table = lock(&self.table);
            table.unstarted = 0;
            let entries = std::mem::take(&mut table.entries);
            let kept = entries.iter().filter(|(_, entry)| !entry.cancelled);
            let cancels = kept.map(|(&sequence, entry)| Cancel {
                sequence,
                attempt: entry.slot.attempt,
            });
            table.cancels.extend(cancels);
            entries
        };
        for entry in entries.into_values() {
            entry.slot.end(Event::Lost);
        }
        self.wake.notify_one();
    }

    /// What is placed here now.
    pub(crate) fn placed(&self) -> Placed {
        let table = lock(&self.table);
        Placed {
            sequences: table.entries.len() as u32,
            unstarted_tokens: table.unstarted,
        }
    }

    /// Whether a sequence is still here; it is sent then.
    fn sends(&self, sequence: u64, attempt: u32) -> bool {
        let mut table = lock(&self.table);
        let Some(entry) = table.attempt(sequence, attempt) else {
            return false;
        };
        entry.sent = true;
        if entry.is_noted() {
            table.noted.push(sequence);
        }
        true
    }

    /// Has the worker end a sequence that is still listened to.
    fn cancel(&self, sequence: u64, attempt: u32) {
        let mut table = lock(&self.table);
        let entry = table.attempt(sequence, attempt);
        if entry.is_some_and(|entry| !std::mem::replace(&mut entry.cancelled, true)) {
            table.cancels.push(Cancel { sequence, attempt });
            drop(table);
            self.wake.notify_one();
        }
    }

    fn withdraw(&self, sequence: u64, attempt: u32) {
        let mut table = lock(&self.table);
        let entry = table.remove(sequence, attempt);
        if entry.is_some_and(|entry| !entry.cancelled) {
            table.cancels.push(Cancel { sequence, attempt });
            drop(table);
            self.wake.notify_one();
        }
    }
}

/// Cancellations and notes first, then submissions, and a ping now and then.
fn outgoing(
    session: Arc<Session>,
    mut submissions: mpsc::Receiver<Submit>,
    ping_interval: Duration,
) -> impl Stream<Item = RouterFrame> + Send + 'static {
    let frame = |frame| RouterFrame { frame: Some(frame) };
    async_stream::stream! {
        let mut ping = tokio::time::interval(ping_interval);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut nonce = 0;
        while let Some(notes) = session.notes() {
            for note in notes {
                yield frame(note);
            }
            tokio::select! {
                biased;
                () = session.wake.notified() => {}
                Some(submit) = submissions.recv() => {
                    // One that was withdrawn meanwhile must not follow its own cancellation.
                    if session.sends(submit.sequence, submit.attempt) {
                        yield frame(Frame::Submit(submit));
                    }
                }
                _ = ping.tick() => {
                    nonce += 1;
                    yield frame(Frame::Ping(Ping { nonce }));
                }
            }
        }
    }
}

/// A client's hold on one attempt; dropping it cancels the attempt.
#[derive(Debug)]
pub(crate) struct Attachment {
    session: Arc<Session>,
    sequence: u64,
    slot: Arc<Slot>,
}

impl Attachment {
    /// Waits for news. Cancel-safe.
    pub(crate) async fn next(&self) -> Event {
        poll_fn(|cx| self.slot.poll_next(cx)).await
    }

    /// Guesses at its tokens, made elsewhere; they replace those that were not sent.
    pub(crate) fn draft(&self, draft: Draft) {
        let (sequence, attempt) = (self.sequence, self.slot.attempt);
        self.session.note(sequence, attempt, |entry| {
            entry.draft = Some(Draft {
                sequence,
                attempt,
                ..draft
            });
        });
    }

    /// Tells it what the sequence that it runs ahead of has from an output position on.
    pub(crate) fn follow(&self, base: u32, tokens: &[TokenId]) {
        let (sequence, attempt) = (self.sequence, self.slot.attempt);
        self.session.note(sequence, attempt, |entry| {
            let follow = entry.follow.get_or_insert_with(|| Follow {
                sequence,
                attempt,
                base,
                tokens: Vec::new(),
            });
            follow.tokens.extend_from_slice(tokens);
        });
    }

    /// Has the worker end it; what it says last still comes.
    pub(crate) fn cancel(&self) {
        self.session.cancel(self.sequence, self.slot.attempt);
    }

    /// The permit, for an attempt elsewhere, where the worker is not done.
    pub(crate) fn take_permit(&self) -> Option<Permit> {
        self.slot.take_permit()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.session.withdraw(self.sequence, self.slot.attempt);
    }
}

#[cfg(test)]
mod tests;
