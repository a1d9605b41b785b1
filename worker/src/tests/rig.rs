//! A worker with the fake backend on a real socket, and a router's side of a session.

use std::{net::SocketAddr, time::Duration};

use shoal_fabric::{
    net::{self, ClientConfig, Limits, ListenConfig, Network},
    shutdown::Shutdown,
};
use shoal_proto::worker::{
    Finish, Ping, Pong, Rejected, RouterFrame, Sampling, SequenceOutput, Stopping, Submit,
    TokenizerBundle, WorkerFrame, router_frame, worker_client::WorkerClient, worker_frame,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use super::fake::{Control, FakeBackend};
use crate::{
    WorkerConfig, WorkerError,
    load::{LoadError, Loaded},
    run,
    run::{on_own_threads, serve},
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Status code and body of an HTTP GET.
pub(crate) async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    in_time(stream.read_to_string(&mut response)).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

pub(crate) struct Rig {
    pub(crate) address: SocketAddr,
    /// Of the fake backend, where that runs.
    pub(crate) control: Control,
    pub(crate) shutdown: Shutdown,
    pub(crate) task: JoinHandle<Result<(), WorkerError>>,
}

pub(crate) fn config() -> WorkerConfig {
    let listen = ListenConfig {
        network: Network::Tcp,
        address: ([127, 0, 0, 1], 0).into(),
        tls: None,
        limits: Limits::default(),
    };
    WorkerConfig::new("fake.gguf".into(), listen)
}

/// A bundle of several chunks.
pub(crate) fn tokenizer() -> TokenizerBundle {
    TokenizerBundle {
        tokens: (0..100_000).map(|i| format!("token {i}")).collect(),
        ..TokenizerBundle::default()
    }
}

impl Rig {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut WorkerConfig)) -> Self {
        let control = Control::default();
        let backend = FakeBackend::new(control.clone());
        let load = |_: &WorkerConfig| {
            Ok(Loaded {
                backend: Box::new(backend),
                tokenizer: tokenizer(),
                group: None,
            })
        };
        Self::loading(change, control, load).await
    }

    pub(crate) async fn loading(
        change: impl FnOnce(&mut WorkerConfig),
        control: Control,
        load: impl FnOnce(&WorkerConfig) -> Result<Loaded, LoadError> + Send + 'static,
    ) -> Self {
        let mut config = config();
        change(&mut config);
        let listener = net::bind(&config.listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let task = tokio::spawn(serve(
            config,
            listener,
            shutdown.clone(),
            on_own_threads(load),
        ));
        Self {
            address,
            control,
            shutdown,
            task,
        }
    }

    /// The worker as a process runs it, on the model that `config` names.
    pub(crate) async fn running(config: WorkerConfig) -> Self {
        let shutdown = Shutdown::new();
        let mut phase = shutdown.phase();
        let task = tokio::spawn(run(config, shutdown.clone()));
        let listening = in_time(phase.wait_for(|phase| phase.address.is_some())).await;
        let address = listening.unwrap().address.unwrap();
        Self {
            address,
            control: Control::default(),
            shutdown,
            task,
        }
    }

    pub(crate) fn channel(&self) -> Channel {
        let endpoint = self.address.to_string().parse().unwrap();
        net::channel(&endpoint, &ClientConfig::default()).unwrap()
    }

    pub(crate) fn client(&self) -> WorkerClient<Channel> {
        WorkerClient::new(self.channel())
    }

    pub(crate) async fn session(&self) -> Session {
        Session::open(&mut self.client()).await
    }

    /// Status code and body of an HTTP GET.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        get(self.address, path).await
    }

    /// The value of a metric without labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = lines.find(|(of, _)| *of == name).expect("a metric");
        value.parse().unwrap()
    }

    /// Waits until the metrics hold all of these lines.
    pub(crate) async fn until_metrics(&self, lines: &[&str]) {
        in_time(async {
            loop {
                let (_, text) = self.get("/metrics").await;
                if lines.iter().all(|line| text.lines().any(|l| l == *line)) {
                    return;
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Waits until nothing is held for anybody.
    pub(crate) async fn until_empty(&self) {
        self.until_metrics(&[
            "shoal_worker_sessions 0",
            "shoal_engine_running_sequences 0",
            "shoal_engine_waiting_sequences 0",
            "shoal_engine_kv_usage_ratio 0.0",
        ])
        .await;
    }

    pub(crate) async fn end(self) -> Result<(), WorkerError> {
        self.shutdown.start();
        in_time(self.task).await.unwrap()
    }
}

/// A router's side of a session.
pub(crate) struct Session {
    pub(crate) send: mpsc::Sender<RouterFrame>,
    pub(crate) frames: Streaming<WorkerFrame>,
}

impl Session {
    pub(crate) async fn open(client: &mut WorkerClient<Channel>) -> Self {
        Self::try_open(client).await.unwrap()
    }

    pub(crate) async fn try_open(client: &mut WorkerClient<Channel>) -> Result<Self, Status> {
        let (send, frames) = mpsc::channel(64);
        let frames = in_time(client.session(ReceiverStream::new(frames))).await?;
        Ok(Self {
            send,
            frames: frames.into_inner(),
        })
    }

    pub(crate) async fn send(&self, frame: router_frame::Frame) {
        let frame = RouterFrame { frame: Some(frame) };
        in_time(self.send.send(frame)).await.unwrap();
    }

    pub(crate) async fn submit(&self, submit: Submit) {
        self.send(router_frame::Frame::Submit(submit)).await;
    }

    /// Waits for the answer to a ping: whatever was sent before has arrived by then.
    pub(crate) async fn ping(&mut self, nonce: u64) -> Pong {
        self.send(router_frame::Frame::Ping(Ping { nonce })).await;
        self.next(|frame| match frame {
            worker_frame::Frame::Pong(pong) if pong.nonce == nonce => Some(pong),
            _ => None,
        })
        .await
    }

    /// `None` at the end of the stream.
    pub(crate) async fn frame(&mut self) -> Result<Option<worker_frame::Frame>, Status> {
        let frame = in_time(self.frames.message()).await?;
        Ok(frame.map(|frame| frame.frame.expect("a frame of this version")))
    }

    /// The next frame that `pick` wants.
    pub(crate) async fn next<T>(&mut self, pick: impl Fn(worker_frame::Frame) -> Option<T>) -> T {
        loop {
            let frame = self.frame().await.unwrap().expect("the stream goes on");
            if let Some(picked) = pick(frame) {
                return picked;
            }
        }
    }

    pub(crate) async fn outputs(&mut self) -> Vec<SequenceOutput> {
        self.next(|frame| match frame {
            worker_frame::Frame::Step(step) => Some(step.sequences),
            _ => None,
        })
        .await
    }

    pub(crate) async fn rejected(&mut self) -> Rejected {
        self.next(|frame| match frame {
            worker_frame::Frame::Rejected(rejected) => Some(rejected),
            _ => None,
        })
        .await
    }

    /// A sequence's tokens and its last output.
    pub(crate) async fn answer(&mut self, sequence: u64) -> (Vec<u32>, SequenceOutput) {
        self.rest(sequence, 0).await
    }

    /// The same of a sequence that resumed after `offset` tokens.
    pub(crate) async fn rest(
        &mut self,
        sequence: u64,
        offset: usize,
    ) -> (Vec<u32>, SequenceOutput) {
        let mut tokens = Vec::new();
        loop {
            for output in self.outputs().await {
                if output.sequence != sequence {
                    continue;
                }
                assert_eq!(output.output_offset as usize, offset + tokens.len());
                tokens.extend(&output.tokens);
                if output.finish() != Finish::Unspecified {
                    return (tokens, output);
                }
            }
        }
    }
}

/// A greedy submission.
pub(crate) fn submit(sequence: u64, prompt: &[u32], max_tokens: u32) -> Submit {
    Submit {
        sequence,
        prompt: prompt.into(),
        sampling: Some(Sampling {
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..Sampling::default()
        }),
        stopping: Some(Stopping {
            max_tokens,
            ..Stopping::default()
        }),
        cache_namespace: vec![0; 16],
        ..Submit::default()
    }
}
