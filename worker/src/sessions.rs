//! The open sessions, and the way of a step's outputs into them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shoal_engine::request::{Load, PageChange, SequenceOutput, StepSink};
use tokio_util::sync::DropGuard;

use crate::{outbox::Outbox, pages::Pages};

/// The outboxes of all open sessions.
#[derive(Debug)]
pub(crate) struct Sessions {
    /// Most open at one time.
    limit: usize,
    /// Bytes that one may leave unread.
    backlog: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    opened: u64,
    outboxes: HashMap<u64, Arc<Outbox>>,
}

/// A session's place in the table, for as long as it is open.
#[derive(Debug)]
pub(crate) struct Seat {
    /// Never used twice.
    pub(crate) id: u64,
    pub(crate) outbox: Arc<Outbox>,
    sessions: Arc<Sessions>,
}

/// As many sessions are open as may be.
#[derive(Debug, thiserror::Error)]
#[error("{limit} sessions are open, the most there may be")]
pub(crate) struct Full {
    limit: usize,
}

impl Sessions {
    pub(crate) fn new(limit: usize, backlog: usize) -> Self {
        Self {
            limit,
            backlog,
            table: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session of a router.
    pub(crate) fn open(self: &Arc<Self>) -> Result<Seat, Full> {
        let table = self.lock();
        if table.outboxes.len() >= self.limit {
            return Err(Full { limit: self.limit });
        }
        Ok(self.seat(table))
    }

    /// A session of the worker's own.
    pub(crate) fn open_own(self: &Arc<Self>) -> Seat {
        self.seat(self.lock())
    }

    fn seat(self: &Arc<Self>, mut table: MutexGuard<'_, Table>) -> Seat {
        table.opened += 1;
        let (id, outbox) = (table.opened, Arc::new(Outbox::new(self.backlog)));
        table.outboxes.insert(id, outbox.clone());
        Seat {
            id,
            outbox,
            sessions: self.clone(),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.sessions.lock().outboxes.remove(&self.id);
    }
}

/// Brings the outputs of each step to their sessions. What a session made that is gone is
/// dropped.
#[derive(Debug)]
pub(crate) struct Sink {
    sessions: Arc<Sessions>,
    pages: Arc<Pages>,
    /// Tells the end of the engine's thread.
    _ended: DropGuard,
}

impl Sink {
    /// `ended` is triggered when the engine lets the sink go.
    pub(crate) fn new(sessions: Arc<Sessions>, pages: Arc<Pages>, ended: DropGuard) -> Self {
        Self {
            sessions,
            pages,
            _ended: ended,
        }
    }
}

impl StepSink for Sink {
    fn publish(&mut self, step: u64, outputs: &mut Vec<SequenceOutput>, load: &Load) {
        let table = self.sessions.lock();
        let mut outputs = outputs.drain(..).peekable();
        while let Some(session) = outputs.peek().map(|output| output.key.session) {
            let run = std::iter::from_fn(|| outputs.next_if(|o| o.key.session == session));
            match table.outboxes.get(&session) {
                Some(outbox) => outbox.publish(step, load, run),
                None => run.for_each(drop),
            }
        }
        // Only now, so that a session finds all of its step.
        table.outboxes.values().for_each(|outbox| outbox.wake(step));
    }

    fn cached(&mut self, changes: &[PageChange]) {
        self.pages.change(changes);
    }
}

#[cfg(test)]
mod tests {
    use shoal_engine::request::SequenceKey;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn output(session: u64, sequence: u64) -> SequenceOutput {
        SequenceOutput {
            key: SequenceKey {
                session,
                sequence,
                attempt: 0,
            },
            offset: 0,
            tokens: vec![1],
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            finish: None,
        }
    }

    #[test]
    fn a_step_of_interleaved_sessions_is_one_message_each() {
        let sessions = Arc::new(Sessions::new(8, 1 << 20));
        let (a, b) = (sessions.open().unwrap(), sessions.open().unwrap());
        let ended = CancellationToken::new();
        let mut sink = Sink::new(sessions, Arc::default(), ended.clone().drop_guard());
        let mut outputs = vec![
            output(a.id, 1),
            output(b.id, 1),
            output(99, 1),
            output(a.id, 2),
        ];
        sink.publish(1, &mut outputs, &Load::default());
        for (seat, sequences) in [(&a, 2), (&b, 1)] {
            let pending = seat.outbox.try_take().unwrap().unwrap();
            assert_eq!(pending.frames().count(), 1, "of {sequences} sequences");
        }
        assert!(outputs.is_empty() && !ended.is_cancelled());
        drop(sink);
        assert!(ended.is_cancelled());
    }

    #[test]
    fn seats_are_limited_and_come_back() {
        let sessions = Arc::new(Sessions::new(1, 1));
        let seat = sessions.open().unwrap();
        assert_eq!(
            sessions.open().unwrap_err().to_string(),
            "1 sessions are open, the most there may be"
        );
        let id = seat.id;
        drop(seat);
        assert_ne!(sessions.open().unwrap().id, id);
    }
}
