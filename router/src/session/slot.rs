//! Where the output of one attempt waits for its client.

use std::{
    sync::{Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use shoal_proto::worker::{Finish, RejectReason, SequenceOutput};

use super::lock;
use crate::admission::Permit;

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

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) attempt: u32,
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

impl Slot {
    /// A slot for at most `room` tokens.
    pub(super) fn new(attempt: u32, room: usize, permit: Option<Permit>) -> Self {
        Self {
            attempt,
            state: Mutex::new(SlotState {
                pending: None,
                end: None,
                room,
                permit,
                waker: None,
            }),
        }
    }

    /// Merges an output into what waits. False: it is more than was asked for.
    pub(super) fn push(&self, output: SequenceOutput) -> bool {
        let mut state = lock(&self.state);
        let Some(room) = state.room.checked_sub(output.tokens.len()) else {
            return false;
        };
        state.room = room;
        if output.finish != Finish::Unspecified as i32 {
            state.permit = None;
        }
        match &mut state.pending {
            None => state.pending = Some(output),
            Some(pending) => pending.merge(output),
        }
        wake(state);
        true
    }

    /// Nothing follows after this.
    pub(super) fn end(&self, event: Event) {
        let mut state = lock(&self.state);
        state.end = Some(event);
        state.permit = None;
        wake(state);
    }

    pub(super) fn poll_next(&self, cx: &Context<'_>) -> Poll<Event> {
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

    pub(super) fn take_permit(&self) -> Option<Permit> {
        lock(&self.state).permit.take()
    }
}

fn wake(mut state: MutexGuard<'_, SlotState>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}
