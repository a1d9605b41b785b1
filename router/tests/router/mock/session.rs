//! A session: sequences that are stepped by the script.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use shoal_proto::worker::{
    Finish, Load, Logprob, Pong, RejectReason, Rejected, RouterFrame, SequenceOutput,
    SequenceUsage, StateChange, StepOutput, Submit, WorkerFrame, WorkerState,
    router_frame::Frame as Up, worker_frame::Frame as Down,
};
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::{Script, Seen, Shared};
use crate::bundle::END;

/// Log-probabilities of a prompt in one frame.
const PIECE: usize = 2;

struct Running {
    submit: Submit,
    /// Output tokens so far, resumed ones included.
    done: usize,
    started: bool,
}

pub(super) struct Session {
    shared: Arc<Shared>,
    breaks: watch::Receiver<u64>,
    state: watch::Receiver<WorkerState>,
    sequences: BTreeMap<u64, Running>,
    step: u64,
    down: mpsc::Sender<Result<WorkerFrame, Status>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        let count = self.sequences.len();
        self.shared.live.send_modify(|live| *live -= count);
    }
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        down: mpsc::Sender<Result<WorkerFrame, Status>>,
    ) -> Self {
        Self {
            breaks: shared.breaks.subscribe(),
            state: shared.state.subscribe(),
            shared,
            sequences: BTreeMap::new(),
            step: 0,
            down,
        }
    }

    pub(super) async fn run(mut self, mut up: Streaming<RouterFrame>) {
        let shared = self.shared.clone();
        loop {
            tokio::select! {
                biased;
                _ = self.breaks.changed() => {
                    self.down.send(Err(Status::unavailable("crash"))).await.ok();
                    return;
                }
                frame = up.message() => match frame {
                    Ok(Some(frame)) => self.take(frame).await,
                    _ => return,
                },
                _ = self.state.changed() => {
                    let state = *self.state.borrow_and_update() as i32;
                    self.send(Down::State(StateChange { state })).await;
                }
                permit = shared.gate.acquire(), if !self.sequences.is_empty() => {
                    if let Ok(permit) = permit {
                        permit.forget();
                    } else {
                        tokio::task::yield_now().await;
                    }
                    if !self.step().await {
                        return;
                    }
                }
            }
        }
    }

    async fn send(&self, frame: Down) {
        self.down
            .send(Ok(WorkerFrame { frame: Some(frame) }))
            .await
            .ok();
    }

    fn load(&self) -> Load {
        let elsewhere = self.shared.elsewhere.load(Ordering::Relaxed);
        Load {
            prefill_tps: 1000.0,
            decode_tps: 100.0,
            running: self.sequences.len() as u32 + elsewhere,
            ..Load::default()
        }
    }

    async fn take(&mut self, frame: RouterFrame) {
        match frame.frame.unwrap() {
            Up::Submit(submit) => {
                let reject = {
                    let script = self.shared.script.lock().unwrap();
                    let stale = script.reject_epoch == Some(submit.epoch);
                    let stale = stale.then_some(RejectReason::StaleEpoch);
                    script.reject.or(stale)
                };
                let (sequence, attempt) = (submit.sequence, submit.attempt);
                self.shared
                    .seen
                    .send(Seen::Submit(Box::new(submit.clone())))
                    .ok();
                if let Some(reason) = reject {
                    self.send(Down::Rejected(Rejected {
                        sequence,
                        attempt,
                        reason: reason as i32,
                        message: "as scripted".into(),
                    }))
                    .await;
                    return;
                }
                let running = Running {
                    done: submit.resume.len(),
                    submit,
                    started: false,
                };
                assert!(
                    self.sequences.insert(sequence, running).is_none(),
                    "sequence reused"
                );
                self.shared.live.send_modify(|live| *live += 1);
            }
            Up::Cancel(cancel) => {
                if let Some(running) = self.sequences.remove(&cancel.sequence) {
                    self.shared.live.send_modify(|live| *live -= 1);
                    self.send_outputs(vec![running.cancelled()]).await;
                }
                self.shared.seen.send(Seen::Cancel(cancel)).ok();
            }
            Up::Draft(draft) => drop(self.shared.seen.send(Seen::Draft(draft))),
            Up::Follow(follow) => drop(self.shared.seen.send(Seen::Follow(follow))),
            Up::Ping(ping) => {
                let elsewhere = self.shared.steps_elsewhere.load(Ordering::Relaxed);
                self.send(Down::Pong(Pong {
                    nonce: ping.nonce,
                    step: self.step + elsewhere,
                    load: Some(self.load()),
                    expected_step_ms: 0,
                }))
                .await;
            }
        }
    }

    /// False: the session breaks.
    async fn step(&mut self) -> bool {
        self.step += 1;
        let script = self.shared.script.lock().unwrap().clone();
        let mut outputs = Vec::new();
        for running in self.sequences.values_mut() {
            if script.break_at.is_some_and(|at| running.done >= at) {
                self.shared.script.lock().unwrap().break_at = None;
                self.down.send(Err(Status::unavailable("crash"))).await.ok();
                return false;
            }
            if script.preempt_at.is_some_and(|at| running.done >= at) {
                if !script.always_preempt {
                    self.shared.script.lock().unwrap().preempt_at = None;
                }
                outputs.push(SequenceOutput {
                    sequence: running.submit.sequence,
                    attempt: running.submit.attempt,
                    output_offset: running.done as u32,
                    finish: Finish::Preempted as i32,
                    ..SequenceOutput::default()
                });
                continue;
            }
            outputs.push(running.advance(&script));
        }
        for output in &outputs {
            if output.finish != Finish::Unspecified as i32 {
                self.sequences.remove(&output.sequence);
                self.shared.live.send_modify(|live| *live -= 1);
            }
        }
        for output in &mut outputs {
            while output.prompt_logprobs.len() > PIECE {
                self.send_outputs(vec![SequenceOutput {
                    sequence: output.sequence,
                    attempt: output.attempt,
                    output_offset: output.output_offset,
                    prompt_logprobs: output.prompt_logprobs.drain(..PIECE).collect(),
                    ..SequenceOutput::default()
                }])
                .await;
                if script.break_in_scores {
                    self.shared.script.lock().unwrap().break_in_scores = false;
                    self.down.send(Err(Status::unavailable("crash"))).await.ok();
                    return false;
                }
            }
        }
        self.send_outputs(outputs).await;
        true
    }

    async fn send_outputs(&self, sequences: Vec<SequenceOutput>) {
        self.send(Down::Step(StepOutput {
            step: self.step,
            sequences,
            load: Some(self.load()),
        }))
        .await;
    }
}

const USAGE: SequenceUsage = SequenceUsage {
    cached_tokens: 2,
    queue_us: 0,
    prefill_us: 0,
    preemptions: 0,
    drafted: 0,
    accepted: 0,
};

impl Running {
    fn cancelled(&self) -> SequenceOutput {
        SequenceOutput {
            sequence: self.submit.sequence,
            attempt: self.submit.attempt,
            output_offset: self.done as u32,
            finish: Finish::Cancelled as i32,
            usage: Some(USAGE),
            ..SequenceOutput::default()
        }
    }

    fn advance(&mut self, script: &Script) -> SequenceOutput {
        let stopping = self.submit.stopping.clone().unwrap();
        let scoring = self.submit.scoring.unwrap_or_default();
        let max = stopping.max_tokens as usize;
        let offset = self.done;
        let mut tokens = Vec::new();
        let mut finish = Finish::Unspecified;
        if max == 0 {
            finish = Finish::Length;
        }
        while finish == Finish::Unspecified && tokens.len() < script.per_step {
            let token = script
                .answer
                .get(self.done)
                .map_or(END, |&byte| byte.into());
            tokens.push(token);
            self.done += 1;
            if stopping.stop_token_ids.contains(&token) {
                finish = Finish::Stop;
            } else if self.done >= max {
                finish = Finish::Length;
            }
        }
        let first = !std::mem::replace(&mut self.started, true);
        let scored = |count: usize, top: Option<u32>| match top {
            None => Vec::new(),
            Some(top) => vec![logprob(top); count],
        };
        let logprobs = scored(tokens.len(), scoring.output_top);
        let mut prompt_logprobs = Vec::new();
        if first {
            prompt_logprobs = scored(self.submit.prompt.len(), scoring.prompt_top);
            if let Some(first) = prompt_logprobs.first_mut() {
                *first = Logprob {
                    unscored: true,
                    ..Logprob::default()
                };
            }
        }
        let mut output = SequenceOutput {
            sequence: self.submit.sequence,
            attempt: self.submit.attempt,
            output_offset: offset as u32,
            tokens,
            logprobs,
            prompt_logprobs,
            finish: finish as i32,
            usage: (finish != Finish::Unspecified).then_some(USAGE),
        };
        // Said before the break that lost it.
        if script.repeat && first && !self.submit.resume.is_empty() {
            let last = self.submit.resume[self.submit.resume.len() - 1];
            output.output_offset -= 1;
            output.tokens.insert(0, last);
            let repeated = scored(1, scoring.output_top);
            output.logprobs.splice(0..0, repeated);
        }
        output
    }
}

fn logprob(top: u32) -> Logprob {
    Logprob {
        logprob: -0.5,
        top_tokens: (0..top).map(|i| u32::from(b'a') + i).collect(),
        top_logprobs: (0..top).map(|i| -0.5 - i as f32).collect(),
        unscored: false,
    }
}
