//! What waits to go out over a session.
//!
//! The engine's thread puts each step's outputs in and never waits; the session takes
//! everything at once when its stream has room. Outputs of one sequence merge meanwhile, so a
//! slow reader costs memory only for what it asked for, up to a limit that ends its session.

use std::{
    iter::{self, Peekable},
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use prost::Message;
use shoal_engine::request::{Load, SequenceOutput};
use shoal_proto::worker::{
    self as proto, Finish, Logprob, Pong, Rejected, StepOutput, WorkerFrame, worker_frame::Frame,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::wire;

/// Most bytes of a frame.
const FRAME_BYTES: usize = 64 << 10;
/// Most log-probabilities of a kind in one output of a frame; one is at most 195 bytes long.
const FRAME_LOGPROBS: usize = 128;
/// Most tokens without log-probabilities in one output of a frame; one is at most 5 bytes long.
const FRAME_TOKENS: usize = 4096;

/// The backlog has passed its limit; nothing of it is left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overflow;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Outbox {
    /// Bytes.
    limit: usize,
    pending: Mutex<Pending>,
    wake: Notify,
    overflowed: CancellationToken,
}

/// Everything since the session took the last.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    step: u64,
    load: Load,
    outputs: Vec<proto::SequenceOutput>,
    rejected: Vec<Rejected>,
    pong: Option<Pong>,
    /// About what it holds in memory.
    bytes: usize,
    overflow: bool,
}

impl Outbox {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            pending: Mutex::default(),
            wake: Notify::new(),
            overflowed: CancellationToken::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds outputs of a step; [`wake`](Self::wake) once all are there.
    pub(crate) fn publish(
        &self,
        step: u64,
        load: &Load,
        outputs: impl Iterator<Item = SequenceOutput>,
    ) {
        let mut pending = self.lock();
        (pending.step, pending.load) = (step, *load);
        for output in outputs {
            pending.push(wire::output(output), self.limit);
        }
        if pending.overflow {
            self.overflowed.cancel();
        }
    }

    /// Wakes the session if the step gave it something.
    pub(crate) fn wake(&self, step: u64) {
        if self.lock().step == step {
            self.wake.notify_one();
        }
    }

    pub(crate) fn reject(&self, rejected: Rejected) {
        let mut pending = self.lock();
        let bytes = mem::size_of::<Rejected>() + rejected.message.len();
        if pending.take_room(bytes, self.limit) {
            pending.rejected.push(rejected);
        } else {
            self.overflowed.cancel();
        }
        drop(pending);
        self.wake.notify_one();
    }

    /// The newest answer replaces one that was not sent.
    pub(crate) fn pong(&self, pong: Pong) {
        self.lock().pong = Some(pong);
        self.wake.notify_one();
    }

    /// Waits until the backlog passes its limit, also while nobody takes from it.
    pub(crate) async fn overflowed(&self) {
        self.overflowed.cancelled().await;
    }

    /// Waits for something to send and takes all of it. Cancel-safe.
    pub(crate) async fn take(&self) -> Result<Pending, Overflow> {
        loop {
            if let Some(pending) = self.try_take()? {
                return Ok(pending);
            }
            self.wake.notified().await;
        }
    }

    /// Takes what there is.
    pub(crate) fn try_take(&self) -> Result<Option<Pending>, Overflow> {
        let mut pending = self.lock();
        if pending.overflow {
            return Err(Overflow);
        }
        Ok((!pending.is_empty()).then(|| mem::take(&mut *pending)))
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.outputs.is_empty() && self.rejected.is_empty() && self.pong.is_none()
    }

    /// Counts `bytes`; false once the limit is passed.
    fn take_room(&mut self, bytes: usize, limit: usize) -> bool {
        self.bytes += bytes;
        if self.bytes > limit && !self.overflow {
            *self = Self {
                step: self.step,
                overflow: true,
                ..Self::default()
            };
        }
        !self.overflow
    }

    fn push(&mut self, output: proto::SequenceOutput, limit: usize) {
        let open = |o: &proto::SequenceOutput| {
            (o.sequence, o.attempt) == (output.sequence, output.attempt)
                && o.finish() == Finish::Unspecified
        };
        let place = self.outputs.iter().position(open);
        let entry = if place.is_none() {
            mem::size_of_val(&output)
        } else {
            0
        };
        if !self.take_room(entry + weight(&output), limit) {
            return;
        }
        match place {
            None => self.outputs.push(output),
            Some(place) => self.outputs[place].merge(output),
        }
    }

    /// The outputs that are the last of their sequences.
    pub(crate) fn ended(&self) -> impl Iterator<Item = &proto::SequenceOutput> {
        let ended = |o: &&proto::SequenceOutput| o.finish() != Finish::Unspecified;
        self.outputs.iter().filter(ended)
    }

    /// The frames that carry it, each of at most 64 KiB: nearly always one.
    pub(crate) fn frames(self) -> impl Iterator<Item = WorkerFrame> {
        let (step, load) = (self.step, wire::load(&self.load));
        let mut pieces = self.outputs.into_iter().flat_map(pieces).peekable();
        let steps = iter::from_fn(move || {
            let sequences = fill(&mut pieces);
            (!sequences.is_empty()).then_some(StepOutput {
                step,
                sequences,
                load: Some(load),
            })
        });
        let pong = self.pong.map(Frame::Pong).into_iter();
        let rejected = self.rejected.into_iter().map(Frame::Rejected);
        let frames = pong.chain(rejected).chain(steps.map(Frame::Step));
        frames.map(|frame| WorkerFrame { frame: Some(frame) })
    }
}

/// About the memory that an output holds beside itself, in bytes.
fn weight(output: &proto::SequenceOutput) -> usize {
    let logprobs = output.logprobs.iter().chain(&output.prompt_logprobs);
    let logprobs = logprobs.map(|l| mem::size_of::<Logprob>() + l.top_tokens.len() * 8);
    output.tokens.len() * 4 + logprobs.sum::<usize>()
}

/// The outputs of one frame.
fn fill(
    pieces: &mut Peekable<impl Iterator<Item = proto::SequenceOutput>>,
) -> Vec<proto::SequenceOutput> {
    let mut sequences = Vec::with_capacity(pieces.size_hint().0);
    // For the step, its load and the frame around them.
    let mut bytes = 128;
    let mut fits = |piece: &proto::SequenceOutput| {
        // Tag and length.
        bytes += piece.encoded_len() + 4;
        bytes <= FRAME_BYTES
    };
    while let Some(piece) = pieces.next_if(&mut fits) {
        sequences.push(piece);
    }
    sequences
}

/// An output as several, each small enough for a frame. What is asked for once per prompt
/// token comes first, beside no token.
fn pieces(output: proto::SequenceOutput) -> impl Iterator<Item = proto::SequenceOutput> {
    let mut rest = Some(output);
    iter::from_fn(move || {
        let output = rest.as_mut()?;
        if output.prompt_logprobs.len() > FRAME_LOGPROBS {
            return Some(proto::SequenceOutput {
                prompt_logprobs: output.prompt_logprobs.drain(..FRAME_LOGPROBS).collect(),
                ..empty(output)
            });
        }
        let tokens = if output.logprobs.is_empty() {
            FRAME_TOKENS
        } else {
            FRAME_LOGPROBS
        };
        if output.tokens.len() <= tokens {
            return rest.take();
        }
        let scored = output.logprobs.len().min(tokens);
        let piece = proto::SequenceOutput {
            tokens: output.tokens.drain(..tokens).collect(),
            logprobs: output.logprobs.drain(..scored).collect(),
            prompt_logprobs: mem::take(&mut output.prompt_logprobs),
            ..empty(output)
        };
        output.output_offset += tokens as u32;
        Some(piece)
    })
}

/// An output of the same sequence, at the same place, of nothing.
fn empty(output: &proto::SequenceOutput) -> proto::SequenceOutput {
    proto::SequenceOutput {
        sequence: output.sequence,
        attempt: output.attempt,
        output_offset: output.output_offset,
        ..proto::SequenceOutput::default()
    }
}

#[cfg(test)]
mod tests {
    use shoal_engine::request::{Finish as End, SequenceKey, Usage};

    use super::*;

    fn output(sequence: u64, offset: u32, tokens: usize) -> SequenceOutput {
        SequenceOutput {
            key: SequenceKey {
                session: 1,
                sequence,
                attempt: 0,
            },
            offset,
            tokens: (offset..).take(tokens).collect(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            finish: None,
        }
    }

    fn widest(n: usize) -> Vec<shoal_engine::request::Logprob> {
        let logprob = shoal_engine::request::Logprob {
            logprob: Some(-1.0),
            top: vec![(u32::MAX, -1.0); 20],
        };
        vec![logprob; n]
    }

    fn publish(outbox: &Outbox, step: u64, outputs: Vec<SequenceOutput>) {
        outbox.publish(step, &Load::default(), outputs.into_iter());
    }

    /// The step messages that wait, checked against the frame limit.
    fn steps(outbox: &Outbox) -> Vec<StepOutput> {
        let pending = outbox.try_take().unwrap().expect("something waits");
        let frames = pending.frames().map(|frame| {
            assert!(frame.encoded_len() <= FRAME_BYTES);
            match frame.frame {
                Some(Frame::Step(step)) => step,
                other => panic!("not a step: {other:?}"),
            }
        });
        frames.collect()
    }

    #[test]
    fn a_step_is_one_message() {
        let outbox = Outbox::new(1 << 20);
        publish(&outbox, 4, (0..128).map(|s| output(s, 0, 1)).collect());
        let steps = steps(&outbox);
        assert_eq!((steps.len(), steps[0].step), (1, 4));
        assert_eq!(steps[0].sequences.len(), 128);
        assert!(outbox.try_take().unwrap().is_none());
    }

    #[test]
    fn outputs_of_a_sequence_merge() {
        let outbox = Outbox::new(1 << 20);
        publish(&outbox, 1, vec![output(1, 0, 1), output(2, 0, 1)]);
        publish(&outbox, 2, vec![output(1, 1, 2)]);
        let mut last = output(1, 3, 0);
        last.finish = Some((End::Length, Usage::default()));
        publish(&outbox, 3, vec![last]);
        let steps = steps(&outbox);
        assert_eq!((steps.len(), steps[0].step), (1, 3));
        let merged = &steps[0].sequences[0];
        assert_eq!(merged.tokens, [0, 1, 2]);
        assert_eq!(merged.finish(), Finish::Length);
        assert!(merged.usage.is_some());
        assert_eq!(steps[0].sequences[1].tokens, [0]);
    }

    #[test]
    fn large_outputs_are_spread_and_whole() {
        let outbox = Outbox::new(64 << 20);
        let mut large = output(1, 5, 3000);
        large.logprobs = widest(3000);
        large.prompt_logprobs = widest(2000);
        large.finish = Some((End::Stop, Usage::default()));
        publish(
            &outbox,
            1,
            vec![output(0, 0, 20_000), large, output(2, 0, 1)],
        );
        let (mut offset, mut logprobs, mut prompt, mut ends) = (5, 0, 0, 0);
        for part in steps(&outbox).iter().flat_map(|step| &step.sequences) {
            if part.sequence != 1 {
                continue;
            }
            assert_eq!(part.output_offset, offset);
            assert!(
                part.tokens
                    .iter()
                    .copied()
                    .eq((offset..).take(part.tokens.len()))
            );
            assert!(offset == 5 || part.prompt_logprobs.is_empty());
            assert_eq!(ends, 0, "the end comes last");
            offset += part.tokens.len() as u32;
            logprobs += part.logprobs.len();
            prompt += part.prompt_logprobs.len();
            ends += usize::from(part.finish() == Finish::Stop);
        }
        assert_eq!((offset, logprobs, prompt, ends), (3005, 3000, 2000, 1));
    }

    #[test]
    fn a_backlog_over_the_limit_is_dropped_once_and_for_all() {
        let outbox = Outbox::new(4096);
        publish(&outbox, 1, vec![output(1, 0, 10)]);
        publish(&outbox, 2, vec![output(1, 10, 2000)]);
        assert_eq!(outbox.try_take().unwrap_err(), Overflow);
        publish(&outbox, 3, vec![output(1, 2010, 1)]);
        assert_eq!(outbox.try_take().unwrap_err(), Overflow);
        assert!(outbox.lock().outputs.is_empty());
        assert!(outbox.overflowed.is_cancelled());
    }

    #[test]
    fn a_taken_backlog_gives_its_room_back() {
        let outbox = Outbox::new(4096);
        for step in 0..100 {
            publish(&outbox, step, vec![output(1, 0, 500)]);
            assert_eq!(steps(&outbox).len(), 1);
        }
    }
}
