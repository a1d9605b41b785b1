//! A scriptable worker on a real socket.

mod service;
mod session;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use prost::Message as _;
use sha2::{Digest, Sha256};
use shoal_proto::worker::{
    Cancel, CorpusRecord, Draft, Follow, RejectReason, Submit, WorkerState,
    worker_server::WorkerServer,
};
use tokio::{
    net::TcpListener,
    runtime::{self, Runtime},
    sync::{Semaphore, mpsc, oneshot, watch},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use self::service::Service;
use crate::bundle::bundle;

pub(crate) const MODEL: &str = "mock";
pub(crate) const CONTEXT: u32 = 512;

/// What the worker does with a submission.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// The model that it serves.
    pub(crate) model: String,
    /// It is a draft worker.
    pub(crate) drafts: bool,
    /// It tells of its prefix cache, which is empty; else it is an older worker.
    pub(crate) pages: bool,
    /// The answer, whoever asks; after it comes the end token.
    pub(crate) answer: Vec<u8>,
    /// Tokens per sequence and step.
    pub(crate) per_step: usize,
    /// The session breaks once a sequence has so many output tokens; resumed ones count on.
    pub(crate) break_at: Option<usize>,
    /// The session breaks once after the first piece of a prompt's log-probabilities.
    pub(crate) break_in_scores: bool,
    /// The sequence is given up at that many output tokens, once.
    pub(crate) preempt_at: Option<usize>,
    /// Not once, but every time.
    pub(crate) always_preempt: bool,
    pub(crate) reject: Option<RejectReason>,
    /// What is sent to this epoch is refused as stale.
    pub(crate) reject_epoch: Option<u64>,
    /// Every step says the last token again, as a worker that replays.
    pub(crate) repeat: bool,
}

impl Script {
    pub(crate) fn answer(text: &str) -> Self {
        Self {
            model: MODEL.into(),
            drafts: false,
            pages: false,
            answer: text.as_bytes().to_vec(),
            per_step: 1,
            break_at: None,
            break_in_scores: false,
            preempt_at: None,
            always_preempt: false,
            reject: None,
            reject_epoch: None,
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
    /// The router's log is over.
    CorpusEnd,
    Draft(Draft),
    Follow(Follow),
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
    epoch: watch::Sender<u64>,
    /// Sequences that other routers run here.
    elsewhere: AtomicU32,
    /// Steps for other routers.
    steps_elsewhere: AtomicU64,
}

const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

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
        Self::start_at(ANY_PORT, script).await
    }

    /// The same at an address of one before.
    pub(crate) async fn start_at(address: SocketAddr, script: Script) -> Self {
        let mock = Self::gated_at(address, script).await;
        mock.shared.gate.close();
        mock
    }

    /// A worker whose steps wait for [`step`](Self::step).
    pub(crate) async fn gated(script: Script) -> Self {
        Self::gated_at(ANY_PORT, script).await
    }

    async fn gated_at(address: SocketAddr, script: Script) -> Self {
        let (sender, seen) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            script: Mutex::new(script),
            gate: Semaphore::new(0),
            seen: sender,
            live: watch::Sender::new(0),
            state: watch::Sender::new(WorkerState::Ready),
            breaks: watch::Sender::default(),
            epoch: watch::Sender::new(1),
            elsewhere: AtomicU32::new(0),
            steps_elsewhere: AtomicU64::new(0),
        });
        let mut builder = runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let (bound, listening) = oneshot::channel();
        let service = WorkerServer::new(Service(shared.clone()));
        runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            bound.send(listener.local_addr().unwrap()).unwrap();
            let server = Server::builder().tcp_nodelay(true).add_service(service);
            let incoming = TcpListenerStream::new(listener);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self {
            address: listening.await.unwrap(),
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

    /// Has another epoch from now on; the one before.
    pub(crate) fn renew(&self) -> u64 {
        self.shared.epoch.send_modify(|epoch| *epoch += 1);
        *self.shared.epoch.borrow() - 1
    }

    /// Breaks every session, as a crash does; the next one finds a new epoch.
    pub(crate) fn crash(&self) {
        self.renew();
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

    /// Waits until a router ends its log.
    pub(crate) async fn corpus_end(&mut self) {
        while !matches!(self.seen.recv().await.unwrap(), Seen::CorpusEnd) {}
    }

    /// The next draft.
    pub(crate) async fn drafted(&mut self) -> Draft {
        loop {
            if let Seen::Draft(draft) = self.seen.recv().await.unwrap() {
                return draft;
            }
        }
    }

    /// What a sequence is told next of the one that it runs ahead of.
    pub(crate) async fn followed(&mut self) -> Follow {
        loop {
            if let Seen::Follow(follow) = self.seen.recv().await.unwrap() {
                return follow;
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

/// The tokens of a text in this model.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}
