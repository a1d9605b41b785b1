//! A scriptable worker on a real socket.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use futures::{StreamExt, stream::BoxStream};
use prost::Message as _;
use sha2::{Digest, Sha256};
use shoal_proto::{
    PROTOCOL_VERSION,
    worker::{
        BulkFrame, BulkRequest, Cancel, Chunk, CorpusPosition, CorpusRecord, DescribeRequest,
        DrainRequest, DrainResponse, FetchTokenizerRequest, Finish, Load, Logprob,
        ModelDescription, Pong, RejectReason, Rejected, RouterFrame, SequenceOutput, SequenceUsage,
        StateChange, StepOutput, Submit, UndrainRequest, UndrainResponse, WorkerFrame, WorkerState,
        router_frame::Frame as Up,
        worker_frame::Frame as Down,
        worker_server::{Worker, WorkerServer},
    },
};
use tokio::{
    net::TcpListener,
    runtime::{self, Runtime},
    sync::{Semaphore, mpsc, oneshot, watch},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::bundle::{END, bundle};

pub(crate) const MODEL: &str = "mock";
pub(crate) const CONTEXT: u32 = 512;

/// What the worker does with a submission.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// The model that it serves.
    pub(crate) model: String,
    /// The answer, whoever asks; after it comes the end token.
    pub(crate) answer: Vec<u8>,
    /// Tokens per sequence and step.
    pub(crate) per_step: usize,
    /// The session breaks once a sequence has so many output tokens; resumed ones count on.
    pub(crate) break_at: Option<usize>,
    /// The sequence is given up at that many output tokens, once.
    pub(crate) preempt_at: Option<usize>,
    /// Not once, but every time.
    pub(crate) always_preempt: bool,
    pub(crate) reject: Option<RejectReason>,
    /// Every step says the last token again, as a worker that replays.
    pub(crate) repeat: bool,
}

impl Script {
    pub(crate) fn answer(text: &str) -> Self {
        Self {
            model: MODEL.into(),
            answer: text.as_bytes().to_vec(),
            per_step: 1,
            break_at: None,
            preempt_at: None,
            always_preempt: false,
            reject: None,
            repeat: false,
        }
    }
}

/// What the worker saw.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    Submit(Box<Submit>),
    Cancel(Cancel),
    Corpus(Box<CorpusRecord>),
}

#[derive(Debug)]
struct Shared {
    script: Mutex<Script>,
    /// A step takes one permit; closed is free running.
    gate: Semaphore,
    seen: mpsc::UnboundedSender<Seen>,
    /// Sequences that run.
    live: watch::Sender<usize>,
    state: watch::Sender<WorkerState>,
    breaks: watch::Sender<u64>,
    epoch: Mutex<u64>,
    /// Sequences that other routers run here.
    elsewhere: AtomicU32,
    /// Steps for other routers.
    steps_elsewhere: AtomicU64,
}

/// A worker under a test's control. Dropping it is the death of its process: listener and
/// connections go at once.
pub(crate) struct Mock {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    seen: mpsc::UnboundedReceiver<Seen>,
    runtime: Option<Runtime>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Mock {
    /// A worker that steps as fast as it can.
    pub(crate) async fn start(script: Script) -> Self {
        let mock = Self::gated(script).await;
        mock.shared.gate.close();
        mock
    }

    /// A worker whose steps wait for [`step`](Self::step).
    pub(crate) async fn gated(script: Script) -> Self {
        let (sender, seen) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            script: Mutex::new(script),
            gate: Semaphore::new(0),
            seen: sender,
            live: watch::Sender::new(0),
            state: watch::Sender::new(WorkerState::Ready),
            breaks: watch::Sender::default(),
            epoch: Mutex::new(1),
            elsewhere: AtomicU32::new(0),
            steps_elsewhere: AtomicU64::new(0),
        });
        let mut builder = runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let (bound, address) = oneshot::channel();
        let service = WorkerServer::new(Service(shared.clone()));
        runtime.spawn(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            bound.send(listener.local_addr().unwrap()).unwrap();
            let server = Server::builder().tcp_nodelay(true).add_service(service);
            let incoming = TcpListenerStream::new(listener);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self {
            address: address.await.unwrap(),
            shared,
            seen,
            runtime: Some(runtime),
        }
    }

    /// Lets so many steps happen.
    pub(crate) fn step(&self, steps: usize) {
        self.shared.gate.add_permits(steps);
    }

    /// Counts so many steps more, as a worker does that works for others.
    pub(crate) fn advance(&self, steps: u64) {
        self.shared
            .steps_elsewhere
            .fetch_add(steps, Ordering::Relaxed);
    }

    pub(crate) fn set_script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.shared.script.lock().unwrap());
    }

    pub(crate) fn set_state(&self, state: WorkerState) {
        self.shared.state.send_replace(state);
    }

    /// Lets other routers run so many sequences here.
    pub(crate) fn set_elsewhere(&self, sequences: u32) {
        self.shared.elsewhere.store(sequences, Ordering::Relaxed);
    }

    /// Breaks every session, as a crash does; the next one finds a new epoch.
    pub(crate) fn crash(&self) {
        *self.shared.epoch.lock().unwrap() += 1;
        self.shared.breaks.send_modify(|n| *n += 1);
    }

    /// The next submission.
    pub(crate) async fn submitted(&mut self) -> Submit {
        loop {
            if let Seen::Submit(submit) = self.seen.recv().await.unwrap() {
                return *submit;
            }
        }
    }

    /// Submissions so far that the test has not taken.
    pub(crate) fn untaken(&mut self) -> usize {
        let seen = std::iter::from_fn(|| self.seen.try_recv().ok());
        seen.filter(|seen| matches!(seen, Seen::Submit(_))).count()
    }

    /// The next record that erases text.
    pub(crate) async fn erased(&mut self) -> CorpusRecord {
        loop {
            if let Seen::Corpus(record) = self.seen.recv().await.unwrap()
                && record.erase
            {
                return *record;
            }
        }
    }

    /// The next record with text that drafts.
    pub(crate) async fn text(&mut self) -> CorpusRecord {
        loop {
            if let Seen::Corpus(record) = self.seen.recv().await.unwrap()
                && !record.tokens.is_empty()
            {
                return *record;
            }
        }
    }

    /// The next cancellation.
    pub(crate) async fn cancelled(&mut self) -> Cancel {
        loop {
            if let Seen::Cancel(cancel) = self.seen.recv().await.unwrap() {
                return cancel;
            }
        }
    }

    /// Waits until so many sequences run.
    pub(crate) async fn live(&self, count: usize) {
        let mut live = self.shared.live.subscribe();
        live.wait_for(|&n| n == count).await.unwrap();
    }
}

/// Of the bundle.
pub(crate) fn tokenizer_sha256() -> Vec<u8> {
    Sha256::digest(bundle().encode_to_vec()).to_vec()
}

struct Service(Arc<Shared>);

#[tonic::async_trait]
impl Worker for Service {
    type FetchTokenizerStream = BoxStream<'static, Result<Chunk, Status>>;
    type SessionStream = BoxStream<'static, Result<WorkerFrame, Status>>;
    type BulkStream = BoxStream<'static, Result<BulkFrame, Status>>;
    type CorpusStream = BoxStream<'static, Result<CorpusPosition, Status>>;

    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<ModelDescription>, Status> {
        Ok(Response::new(ModelDescription {
            protocol_version: PROTOCOL_VERSION,
            model: self.0.script.lock().unwrap().model.clone(),
            architecture: "mock".into(),
            quantization: "none".into(),
            context_length: CONTEXT,
            vocab_size: bundle().tokens.len() as u32,
            tokenizer_sha256: tokenizer_sha256(),
            numerics_id: b"mock".to_vec(),
            epoch: *self.0.epoch.lock().unwrap(),
            state: *self.0.state.borrow() as i32,
            ..ModelDescription::default()
        }))
    }

    async fn fetch_tokenizer(
        &self,
        _: Request<FetchTokenizerRequest>,
    ) -> Result<Response<Self::FetchTokenizerStream>, Status> {
        let encoded = bundle().encode_to_vec();
        let chunks: Vec<_> = encoded
            .chunks(100)
            .map(|c| Ok(Chunk { data: c.to_vec() }))
            .collect();
        Ok(Response::new(futures::stream::iter(chunks).boxed()))
    }

    async fn session(
        &self,
        request: Request<Streaming<RouterFrame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (down, frames) = mpsc::channel(16);
        // From here on it misses nothing, whenever its task runs.
        let session = Session {
            breaks: self.0.breaks.subscribe(),
            state: self.0.state.subscribe(),
            shared: self.0.clone(),
            sequences: BTreeMap::new(),
            step: 0,
            down,
        };
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(frames).boxed()))
    }

    async fn corpus(
        &self,
        request: Request<Streaming<CorpusRecord>>,
    ) -> Result<Response<Self::CorpusStream>, Status> {
        let (records, seen) = (request.into_inner(), self.0.seen.clone());
        let first = futures::stream::iter([Ok(CorpusPosition { next: 0 })]);
        // Every record is one, the first included: it says whose log this is.
        let rest = records.filter_map(move |record| {
            if let Ok(record) = record {
                seen.send(Seen::Corpus(Box::new(record))).ok();
            }
            std::future::ready(None)
        });
        Ok(Response::new(first.chain(rest).boxed()))
    }

    async fn bulk(
        &self,
        _: Request<Streaming<BulkRequest>>,
    ) -> Result<Response<Self::BulkStream>, Status> {
        Err(Status::unimplemented("as an older worker"))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.0.state.send_replace(WorkerState::Draining);
        Ok(Response::new(DrainResponse {
            running: *self.0.live.borrow() as u32,
            waiting: 0,
        }))
    }

    async fn undrain(
        &self,
        _: Request<UndrainRequest>,
    ) -> Result<Response<UndrainResponse>, Status> {
        self.0.state.send_replace(WorkerState::Ready);
        Ok(Response::new(UndrainResponse {}))
    }
}

struct Running {
    submit: Submit,
    /// Output tokens so far, resumed ones included.
    done: usize,
    started: bool,
}

struct Session {
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
    async fn run(mut self, mut up: Streaming<RouterFrame>) {
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
                let reject = self.shared.script.lock().unwrap().reject;
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
                    self.send(Down::Step(StepOutput {
                        step: self.step,
                        sequences: vec![running.cancelled()],
                        load: Some(self.load()),
                    }))
                    .await;
                }
                self.shared.seen.send(Seen::Cancel(cancel)).ok();
            }
            // It does not speculate.
            Up::Draft(_) => {}
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
        self.send(Down::Step(StepOutput {
            step: self.step,
            sequences: outputs,
            load: Some(self.load()),
        }))
        .await;
        true
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
        let scoring = self.submit.scoring.unwrap();
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

/// The tokens of a text in this model.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}
