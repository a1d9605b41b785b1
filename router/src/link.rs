//! The connection to one worker, kept up for as long as the worker is a member.

use std::{sync::Arc, time::Duration};

use shoal_fabric::net::{self, NetError};
use shoal_proto::{
    PROTOCOL_VERSION,
    worker::{
        DescribeRequest, FetchTokenizerRequest, ModelDescription, WorkerFrame,
        worker_client::WorkerClient, worker_frame::Frame,
    },
};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic::{Streaming, transport::Channel};

use crate::{
    cluster::{Cluster, LinkConfig},
    model::{BundleError, BundleHash, Model, TextModel},
    session::Session,
    worker::{Connected, Worker},
};

/// For a call that is not the session.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest tokenizer bundle.
const MAX_BUNDLE: usize = 256 << 20;
/// Largest frame of a worker: one step's output with prompt log-probabilities.
const MAX_FRAME: usize = 64 << 20;
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("{0}")]
    Status(#[from] tonic::Status),
    #[error("it speaks version {theirs} of the protocol, this router {PROTOCOL_VERSION}")]
    Version { theirs: u32 },
    #[error("its tokenizer's hash is no SHA-256")]
    BadHash,
    #[error("its tokenizer is larger than {MAX_BUNDLE} bytes")]
    BundleTooLarge,
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error("the tokenizer's construction broke off")]
    Join(#[from] tokio::task::JoinError),
    #[error("no answer for {CALL_TIMEOUT:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
    #[error("the session ended")]
    Ended,
    #[error("no frame for {0:?}")]
    Silent(Duration),
    #[error("no step for {0:?} with work at hand")]
    Stalled(Duration),
}

/// Connects, and again after a loss with jittered exponential backoff; ends when its future
/// is dropped, or after a loss when the worker is no member any more.
pub(crate) async fn keep(cluster: Arc<Cluster>, worker: Arc<Worker>, config: LinkConfig) {
    let link = Link {
        cluster,
        worker,
        config,
    };
    let mut backoff = FIRST_BACKOFF;
    loop {
        let started = Instant::now();
        let end = link.once().await;
        link.cluster.disconnect(&link.worker);
        if let Err(error) = end {
            tracing::warn!(worker = %link.worker.address, %error, "worker lost");
        }
        if link.cluster.forget(&link.worker) {
            return;
        }
        if started.elapsed() > LONGEST_BACKOFF {
            backoff = FIRST_BACKOFF;
        }
        let pause = backoff.mul_f64(rand::random_range(0.5..1.0));
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
        // What the membership tells meanwhile ends the pause.
        let _ = timeout(pause, link.worker.news.notified()).await;
    }
}

struct Link {
    cluster: Arc<Cluster>,
    worker: Arc<Worker>,
    config: LinkConfig,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cluster.disconnect(&self.worker);
    }
}

impl Link {
    /// One connection, from its first call to its loss.
    async fn once(&self) -> Result<(), LinkError> {
        let channel = net::channel(&self.worker.member().address, &self.config.client)?;
        let mut client = WorkerClient::new(channel).max_decoding_message_size(MAX_FRAME);
        let description = timeout(CALL_TIMEOUT, client.describe(DescribeRequest {})).await??;
        let description = description.into_inner();
        if description.protocol_version != PROTOCOL_VERSION {
            return Err(LinkError::Version {
                theirs: description.protocol_version,
            });
        }
        let text = timeout(CALL_TIMEOUT, self.text(&mut client, &description)).await??;
        let ping_interval = self.config.silence / 4;
        let (session, frames) = Session::new(ping_interval);
        // Ends the outgoing stream should this future be dropped.
        let session = CloseOnDrop(session);
        let frames = timeout(CALL_TIMEOUT, client.session(frames)).await??;
        let created = self.cluster.first_seen(&description.model);
        let model = Arc::new(Model::new(description, text, created));
        tracing::info!(
            worker = %self.worker.address,
            model = %model.name,
            epoch = model.description.epoch,
            "worker connected"
        );
        let connected = Arc::new(Connected::new(model, session.0.clone(), client));
        self.cluster.connect(&self.worker, connected.clone());
        self.read(&connected, frames.into_inner(), ping_interval)
            .await
    }

    async fn text(
        &self,
        client: &mut WorkerClient<Channel>,
        description: &ModelDescription,
    ) -> Result<Arc<TextModel>, LinkError> {
        let hash: BundleHash = description
            .tokenizer_sha256
            .as_slice()
            .try_into()
            .map_err(|_| LinkError::BadHash)?;
        if let Some(text) = self.cluster.texts.get(&hash) {
            return Ok(text);
        }
        let request = FetchTokenizerRequest {
            sha256: hash.to_vec(),
        };
        let mut chunks = client.fetch_tokenizer(request).await?.into_inner();
        let mut encoded = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            if encoded.len() + chunk.data.len() > MAX_BUNDLE {
                return Err(LinkError::BundleTooLarge);
            }
            encoded.extend_from_slice(&chunk.data);
        }
        let cluster = self.cluster.clone();
        let build = tokio::task::spawn_blocking(move || cluster.texts.add(&encoded, hash));
        Ok(build.await??)
    }

    async fn read(
        &self,
        connected: &Connected,
        mut frames: Streaming<WorkerFrame>,
        ping_interval: Duration,
    ) -> Result<(), LinkError> {
        let (silence, stall) = (self.config.silence, self.config.stall);
        let mut watchdog = interval(ping_interval.min(stall / 4));
        watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let (mut step, mut progress) = (0, heard);
        loop {
            tokio::select! {
                frame = frames.message() => {
                    let frame = frame?.ok_or(LinkError::Ended)?.frame;
                    heard = Instant::now();
                    match frame {
                        Some(Frame::Step(output)) => {
                            (step, progress) = (output.step, heard);
                            if let Some(load) = output.load {
                                connected.set_load(load);
                            }
                            connected.session.deliver(output);
                        }
                        Some(Frame::Rejected(rejected)) => connected.session.reject(rejected),
                        Some(Frame::State(change)) => {
                            tracing::info!(
                                worker = %self.worker.address,
                                state = change.state().as_str_name(),
                                "worker changed"
                            );
                            connected.set_state(change.state());
                            self.cluster.changed();
                        }
                        Some(Frame::Pong(pong)) => {
                            if let Some(load) = pong.load {
                                connected.set_load(load);
                            }
                            if pong.step != step {
                                (step, progress) = (pong.step, heard);
                            }
                        }
                        // A frame of a newer worker.
                        None => {}
                    }
                }
                now = watchdog.tick() => {
                    if now.duration_since(heard) > silence {
                        return Err(LinkError::Silent(silence));
                    }
                    if connected.session.placed().sequences == 0 {
                        progress = now;
                    } else if now.duration_since(progress) > stall {
                        return Err(LinkError::Stalled(stall));
                    }
                }
            }
        }
    }
}

struct CloseOnDrop(Arc<Session>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}
