//! The hot stream between this router and one worker.
//!
//! A worker sends one frame per engine step with the new tokens of all sequences. The link
//! task spreads them over [`Slot`]s and never waits: what a client has not fetched yet is
//! merged into one output, which the sequence's `max_tokens` bounds. Dropping an
//! [`Attachment`] cancels its sequence at the worker.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::Stream;
use shoal_core::TokenId;
use shoal_proto::worker::{
    Cancel, Draft, Finish, Follow, Ping, RejectReason, Rejected, RouterFrame, SequenceOutput,
    StepOutput, Submit, router_frame::Frame,
};
use tokio::{
    sync::{Notify, mpsc},
    time::MissedTickBehavior,
};

use crate::admission::Permit;

/// Submissions that wait for the worker's flow control.
const OUTBOUND: usize = 64;

/// What a worker says about a sequence.
#[derive(Debug)]
pub(crate) enum Event {
    /// Everything since the last event.
    Output(SequenceOutput),
    /// The worker does not take it.
    Rejected(RejectReason, String),
    /// The session ended first.
    Lost,
}

/// Where the output of one attempt waits for its client.
#[derive(Debug)]
struct Slot {
    attempt: u32,
    state: Mutex<SlotState>,
}

#[derive(Debug)]
struct SlotState {
    pending: Option<SequenceOutput>,
    end: Option<Event>,
    /// Most tokens the worker may still send.
    room: usize,
    /// Held until the worker is done with the sequence, however slow its client is.
    permit: Option<Permit>,
    /// Of the one task that waits.
    waker: Option<Waker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    /// Merges an output into what waits. False: it is more than was asked for.
    fn push(&self, output: SequenceOutput) -> bool {
        let mut state = lock(&self.state);
        let Some(room) = state.room.checked_sub(output.tokens.len()) else {
            return false;
        };
        state.room = room;
        if output.finish != Finish::Unspecified as i32 && output.finish != Finish::Preempted as i32
        {
            state.permit = None;
        }
        match &mut state.pending {
            None => state.pending = Some(output),
            Some(pending) => pending.merge(output),
        }
        wake(state);
        true
    }

    fn end(&self, event: Event) {
        let mut state = lock(&self.state);
        state.end = Some(event);
        wake(state);
    }

    fn poll_next(&self, cx: &Context<'_>) -> Poll<Event> {
        let mut state = lock(&self.state);
        if let Some(output) = state.pending.take() {
            return Poll::Ready(Event::Output(output));
        }
        if let Some(event) = state.end.take() {
            return Poll::Ready(event);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

fn wake(mut state: MutexGuard<'_, SlotState>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// An entry of the session's table.
#[derive(Debug)]
struct Entry {
    slot: Arc<Slot>,
    /// Tokens to prefill, until the first output shows that they are computed.
    unstarted: u64,
    /// The worker is told to end it.
    cancelled: bool,
    /// The worker is told of it.
    sent: bool,
    /// Not yet sent: the newest guesses at its tokens.
    draft: Option<Draft>,
    /// Not yet sent: what the sequence has that it runs ahead of.
    follow: Option<Follow>,
}

impl Entry {
    /// Whether there is something to be sent about it.
    fn is_noted(&self) -> bool {
        self.draft.is_some() || self.follow.is_some()
    }
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<u64, Entry>,
    /// Sum of the entries' `unstarted`.
    unstarted: u64,
    /// Not yet sent; at most one per attempt.
    cancels: Vec<Cancel>,
    /// Sequences that the worker has, with something to be sent about them. One may be gone.
    noted: Vec<u64>,
    closed: bool,
}

impl Table {
    fn remove(&mut self, sequence: u64, attempt: u32) -> Option<Entry> {
        if self.entries.get(&sequence)?.slot.attempt != attempt {
            return None;
        }
        let entry = self.entries.remove(&sequence)?;
        self.unstarted -= entry.unstarted;
        Some(entry)
    }
}

/// What this router has placed on a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Sequences without their end.
    pub(crate) sequences: u32,
    /// Tokens to prefill of those without an output.
    pub(crate) unstarted_tokens: u64,
}

/// One open stream to a worker.
#[derive(Debug)]
pub(crate) struct Session {
    table: Mutex<Table>,
    outbound: mpsc::Sender<Submit>,
    /// Something changed that the outgoing stream must see.
    wake: Notify,
}

/// The session is over; the permit comes back.
#[derive(Debug)]
pub(crate) struct Closed(pub(crate) Option<Permit>);

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
    ) -> Result<Attachment, Closed> {
        let attachment = self.open(&submit, uncached, permit)?;
        match self.outbound.send(submit).await {
            Ok(()) => Ok(attachment),
            Err(_) => Err(Closed(attachment.take_permit())),
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
    ) -> Result<Attachment, Closed> {
        let (sequence, attempt) = (submit.sequence, submit.attempt);
        let most = submit.stopping.as_ref().map_or(0, |s| s.max_tokens) as usize;
        let room = match submit.lead {
            None => most.saturating_sub(submit.resume.len()),
            // It makes tokens anew as often as it was wrong.
            Some(_) => usize::MAX,
        };
        let slot = Arc::new(Slot {
            attempt,
            state: Mutex::new(SlotState {
                pending: None,
                end: None,
                room,
                permit,
                waker: None,
            }),
        });
        {
            let mut table = lock(&self.table);
            if table.closed {
                return Err(Closed(lock(&slot.state).permit.take()));
            }
            table.unstarted += uncached;
            let entry = Entry {
                slot: slot.clone(),
                unstarted: uncached,
                cancelled: false,
                sent: false,
                draft: None,
                follow: None,
            };
            table.entries.insert(sequence, entry);
        }
        Ok(Attachment {
            session: self.clone(),
            sequence,
            slot,
        })
    }

    /// Changes what is to be sent about a sequence, if it is still here.
    fn note(&self, sequence: u64, attempt: u32, note: impl FnOnce(&mut Entry)) {
        let mut table = lock(&self.table);
        let Table { entries, noted, .. } = &mut *table;
        let entry = entries.get_mut(&sequence);
        let Some(entry) = entry.filter(|entry| entry.slot.attempt == attempt) else {
            return;
        };
        if entry.sent && !entry.is_noted() {
            noted.push(sequence);
        }
        note(entry);
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
            let Some(entry) = table.entries.get_mut(&output.sequence) else {
                continue;
            };
            if entry.slot.attempt != output.attempt {
                continue;
            }
            table.unstarted -= std::mem::take(&mut entry.unstarted);
            let (sequence, attempt) = (output.sequence, output.attempt);
            let last = output.finish != Finish::Unspecified as i32;
            let sound = entry.slot.push(output);
            if !sound {
                tracing::warn!(sequence, "the worker sent more than max_tokens");
                entry.slot.end(Event::Lost);
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
        let Table { entries, noted, .. } = &mut *table;
        let entry = entries.get_mut(&sequence);
        let Some(entry) = entry.filter(|entry| entry.slot.attempt == attempt) else {
            return false;
        };
        entry.sent = true;
        if entry.is_noted() {
            noted.push(sequence);
        }
        true
    }

    /// Has the worker end a sequence that is still listened to.
    fn cancel(&self, sequence: u64, attempt: u32) {
        let mut table = lock(&self.table);
        let entry = table.entries.get_mut(&sequence);
        let entry = entry.filter(|entry| entry.slot.attempt == attempt);
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

    /// The permit, for the next attempt, where the worker is not done.
    pub(crate) fn take_permit(&self) -> Option<Permit> {
        lock(&self.slot.state).permit.take()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.session.withdraw(self.sequence, self.slot.attempt);
    }
}

#[cfg(test)]
mod tests;
