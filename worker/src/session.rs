//! One session: the stream of one router.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use futures::Stream;
use shoal_engine::request::SequenceKey;
use shoal_fabric::telemetry;
use shoal_proto::worker::{
    Ping, Pong, Rejected, RouterFrame, SequenceOutput, StateChange, Submit, WorkerFrame,
    WorkerState, router_frame, worker_frame,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{Span, field::Empty};

use crate::{
    outbox::{Overflow, Pending},
    sessions::Seat,
    wire,
    worker::{Serving, Worker},
};

/// What both directions of a session share.
struct Session {
    worker: Arc<Worker>,
    serving: Arc<Serving>,
    seat: Seat,
    /// One per sequence that has not ended, from its submission to its end.
    spans: Mutex<HashMap<(u64, u32), Trace>>,
    /// Either direction is over, or the worker closes.
    ended: CancellationToken,
}

/// A sequence's span, and when it began.
struct Trace {
    span: Span,
    begun: SystemTime,
}

/// Starts a session on the router's frames; gives the worker's.
pub(crate) fn start(
    worker: Arc<Worker>,
    serving: Arc<Serving>,
    seat: Seat,
    frames: Streaming<RouterFrame>,
) -> impl Stream<Item = Result<WorkerFrame, Status>> + Send + 'static {
    let session = Arc::new(Session {
        ended: worker.closing.child_token(),
        serving,
        seat,
        spans: Mutex::default(),
        worker: worker.clone(),
    });
    worker.metrics.sessions.inc();
    worker.shutdown.spawn(session.clone().read(frames));
    session.write()
}

impl Drop for Session {
    fn drop(&mut self) {
        self.worker.metrics.sessions.dec();
    }
}

impl Session {
    /// Handles the router's frames. Cancels the session's sequences at its end, so nothing is
    /// submitted after that.
    async fn read(self: Arc<Self>, mut frames: Streaming<RouterFrame>) {
        let handle = async {
            while let Some(frame) = frames.message().await? {
                self.handle(frame);
            }
            Ok::<_, Status>(())
        };
        let result = tokio::select! {
            biased;
            () = self.ended.cancelled() => Ok(()),
            // The stream may have no room to end by itself.
            () = self.seat.outbox.overflowed() => Ok(()),
            result = handle => result,
        };
        if let Err(status) = result {
            tracing::debug!(session = self.seat.id, %status, "session broke off");
        }
        self.ended.cancel();
        self.serving.engine.cancel_session(self.seat.id);
    }

    /// The worker's frames: the state first, then one frame per step. Ends the session when it
    /// is dropped.
    fn write(self: Arc<Self>) -> impl Stream<Item = Result<WorkerFrame, Status>> + Send + 'static {
        let end = self.ended.clone().drop_guard();
        let mut state = self.worker.watch();
        state.mark_changed();
        async_stream::try_stream! {
            let _end = end;
            while let Some(frames) = self.news(&mut state).await? {
                for frame in frames {
                    yield frame;
                }
            }
        }
    }

    /// What the router is to hear next; the end comes when nothing else is left.
    async fn news(
        &self,
        state: &mut watch::Receiver<WorkerState>,
    ) -> Result<Option<impl Iterator<Item = WorkerFrame> + use<>>, Status> {
        let overflow = |Overflow| Status::resource_exhausted("the session is read too slowly");
        let (state, pending) = tokio::select! {
            biased;
            Ok(()) = state.changed() => (Some(*state.borrow_and_update()), None),
            pending = self.seat.outbox.take() => (None, Some(pending.map_err(overflow)?)),
            () = self.ended.cancelled() => return Ok(None),
        };
        let frames = pending.map(|pending| self.frames(pending));
        let state = state.map(state_frame).into_iter();
        Ok(Some(state.chain(frames.into_iter().flatten())))
    }

    fn handle(&self, frame: RouterFrame) {
        match frame.frame {
            Some(router_frame::Frame::Submit(submit)) => self.submit(submit),
            Some(router_frame::Frame::Cancel(cancel)) => self.serving.engine.cancel(SequenceKey {
                session: self.seat.id,
                sequence: cancel.sequence,
                attempt: cancel.attempt,
            }),
            Some(router_frame::Frame::Ping(Ping { nonce })) => self.seat.outbox.pong(Pong {
                nonce,
                step: self.serving.engine.steps(),
                load: Some(wire::load(&self.serving.engine.load())),
                expected_step_ms: self.serving.engine.expected_step().as_millis() as u32,
            }),
            Some(router_frame::Frame::Draft(draft)) => {
                let (key, draft) = wire::draft(draft, self.seat.id);
                self.serving.engine.draft(key, draft);
            }
            Some(router_frame::Frame::Follow(follow)) => {
                let key = SequenceKey {
                    session: self.seat.id,
                    sequence: follow.sequence,
                    attempt: follow.attempt,
                };
                let (base, tokens) = (follow.base, follow.tokens);
                self.serving.engine.follow(key, base, tokens);
            }
            // A frame of a newer router.
            None => {}
        }
    }

    fn submit(&self, submit: Submit) {
        let (sequence, attempt) = (submit.sequence, submit.attempt);
        let span = tracing::info_span!(
            "sequence",
            request_id = submit.request_id,
            session = self.seat.id,
            sequence,
            attempt,
            prompt_tokens = submit.prompt.len(),
            resumed_tokens = submit.resume.len(),
            finish = Empty,
            output_tokens = Empty,
            cached_tokens = Empty,
            trace_id = Empty,
        );
        telemetry::set_parent_str(&span, &submit.traceparent);
        // From a log line to the trace.
        if let Some(id) = telemetry::trace_id(&span) {
            span.record("trace_id", id);
        }
        let trace = Trace {
            span: span.clone(),
            begun: SystemTime::now(),
        };
        // Before the engine can end it.
        self.spans().insert((sequence, attempt), trace);
        let identity = &self.serving.identity;
        let (session, corpora) = (self.seat.id, &self.worker.corpora.store);
        let result = wire::request(submit, session, identity, corpora, Instant::now())
            .and_then(|request| Ok(self.serving.engine.submit(request)?));
        let Err(refusal) = result else { return };
        tracing::debug!(parent: &span, %refusal, "sequence refused");
        self.worker.metrics.rejected(refusal.reason());
        self.spans().remove(&(sequence, attempt));
        self.seat.outbox.reject(Rejected {
            sequence,
            attempt,
            reason: refusal.reason().into(),
            message: refusal.to_string(),
        });
    }

    fn frames(&self, pending: Pending) -> impl Iterator<Item = WorkerFrame> + use<> {
        pending.ended().for_each(|output| self.finish(output));
        pending.frames()
    }

    /// Ends the sequence's span.
    fn finish(&self, last: &SequenceOutput) {
        self.worker.metrics.finished(last.finish());
        let trace = self.spans().remove(&(last.sequence, last.attempt));
        let Some(Trace { span, begun }) = trace else {
            return;
        };
        let usage = last.usage.unwrap_or_default();
        span.record("finish", last.finish().as_str_name());
        span.record(
            "output_tokens",
            last.output_offset as usize + last.tokens.len(),
        );
        span.record("cached_tokens", usage.cached_tokens);
        let queue = Duration::from_micros(usage.queue_us);
        let prefill = Duration::from_micros(usage.prefill_us);
        telemetry::phases(
            &span,
            begun,
            &[("queue", queue), ("prefill", prefill)],
            "decode",
        );
        tracing::debug!(
            parent: &span,
            queue_us = usage.queue_us,
            prefill_us = usage.prefill_us,
            preemptions = usage.preemptions,
            "sequence finished"
        );
    }

    fn spans(&self) -> MutexGuard<'_, HashMap<(u64, u32), Trace>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn state_frame(state: WorkerState) -> WorkerFrame {
    WorkerFrame {
        frame: Some(worker_frame::Frame::State(StateChange {
            state: state.into(),
        })),
    }
}
