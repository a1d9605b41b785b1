//! The connection to one worker, kept up for as long as the worker is a member.

use std::{convert::Infallible, sync::Arc, time::Duration};

use shoal_fabric::{
    backoff::Backoff,
    net::{self, NetError},
};
use shoal_proto::{
    PROTOCOL_VERSION,
    worker::{
        BulkRequest, DescribeRequest, FetchTokenizerRequest, FollowPages, ModelDescription,
        RejectReason, WorkerFrame, bulk_frame, bulk_request, worker_client::WorkerClient,
        worker_frame::Frame,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tonic::{Code, Streaming, transport::Channel};

use crate::{
    cluster::{Cluster, LinkConfig},
    model::{BundleError, BundleHash, Model, TextModel},
    pages::Gap,
    request::LONG_TEXT,
    session::Session,
    watchdog::{Suspicion, Watchdog},
    worker::{Connected, Worker},
};

/// For a call that is not the session.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest tokenizer bundle.
const MAX_BUNDLE: usize = 256 << 20;
/// Largest frame of a worker: one step's output with prompt log-probabilities.
const MAX_FRAME: usize = 64 << 20;
/// Before text that drafts is offered again to a worker that ended its stream.
const FEED_PAUSE: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Short, since a worker that is back should not wait for work.
const LONGEST_BACKOFF: Duration = Duration::from_millis(500);
/// A link that has been good for so long starts its backoff anew.
const SOUND: Duration = Duration::from_secs(5);
/// A suspected worker that shows no life for so long is disconnected.
const LONGEST_SUSPICION: Duration = Duration::from_secs(10);

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
    #[error("it has started anew since it was described")]
    Restarted,
    #[error("{0:?} for {1:?}")]
    Lifeless(Suspicion, Duration),
}

/// Connects, and again after a loss with jittered exponential backoff; ends when its future
/// is dropped, or after a loss when the worker is no member any more.
pub(crate) async fn keep(cluster: Arc<Cluster>, worker: Arc<Worker>, config: LinkConfig) {
    let link = Link {
        cluster,
        worker,
        config,
    };
    let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
    let mut failing = false;
    loop {
        let started = Instant::now();
        let Err(error) = link.once().await;
        let was_up = link.cluster.disconnect(&link.worker);
        if was_up || !failing {
            tracing::warn!(worker = %link.worker.address, %error, "no link to the worker");
        } else {
            tracing::debug!(worker = %link.worker.address, %error, "still no link");
        }
        failing = true;
        if link.cluster.forget(&link.worker) {
            return;
        }
        if was_up && started.elapsed() > SOUND {
            backoff.reset();
        }
        // What the membership tells meanwhile ends the pause.
        let _ = timeout(backoff.pause(), link.worker.news.notified()).await;
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
    async fn once(&self) -> Result<Infallible, LinkError> {
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
        let (session, frames) = Session::new(self.config.silence / 4);
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
        let connected = Arc::new(Connected::new(
            model.clone(),
            session.0.clone(),
            client.clone(),
        ));
        self.cluster.connect(&self.worker, connected.clone());
        let end = tokio::select! {
            end = self.read(&connected, frames.into_inner()) => end,
            end = self.follow(&connected, client.clone()) => end,
            never = self.feed(client, &model) => match never {},
        };
        if connected.session.placed().sequences > 0 {
            self.worker.breaker.fail();
        }
        end
    }

    /// Sends the worker text that drafts. Without it the worker is slower, and nothing else.
    async fn feed(&self, client: WorkerClient<Channel>, model: &Model) -> Infallible {
        if model.description.drafts {
            return std::future::pending().await;
        }
        loop {
            let end = self.cluster.corpora.feed(client.clone(), model).await;
            if let Err(status) = end {
                tracing::debug!(worker = %self.worker.address, %status, "no text was taken");
            }
            tokio::time::sleep(FEED_PAUSE).await;
        }
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
        let (cluster, bytes) = (self.cluster.clone(), encoded.len());
        let build = move || cluster.texts.add(&encoded, hash);
        if bytes <= LONG_TEXT {
            return Ok(build()?);
        }
        Ok(tokio::task::spawn_blocking(build).await??)
    }

    async fn read(
        &self,
        connected: &Arc<Connected>,
        mut frames: Streaming<WorkerFrame>,
    ) -> Result<Infallible, LinkError> {
        let mut dog = Watchdog::new(self.config.silence, self.config.stall);
        let mut look = interval(dog.interval());
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                frame = frames.message() => {
                    let frame = frame?.ok_or(LinkError::Ended)?.frame;
                    dog.hear();
                    // None is a frame of a newer worker.
                    if let Some(frame) = frame {
                        self.take(connected, frame, &mut dog)?;
                    }
                    if dog.suspicion().is_none() && connected.set_suspected(false) {
                        tracing::info!(worker = %self.worker.address, "the worker is back");
                        self.cluster.changed();
                    }
                }
                due = look.tick() => {
                    // One that runs ahead of others rests for as long as they do.
                    let works = !connected.drafts() && connected.session.placed().sequences > 0;
                    dog.check(due, works);
                    if let Some((suspicion, time)) = dog.suspicion() {
                        self.suspect(connected, suspicion, time)?;
                    }
                }
            }
        }
    }

    fn take(
        &self,
        connected: &Connected,
        frame: Frame,
        dog: &mut Watchdog,
    ) -> Result<(), LinkError> {
        match frame {
            Frame::Step(output) => {
                dog.hear_step(output.step);
                if let Some(load) = output.load {
                    connected.set_load(load);
                }
                connected.session.deliver(output);
            }
            Frame::Rejected(rejected) => {
                let stale = rejected.reason() == RejectReason::StaleEpoch;
                connected.session.reject(rejected);
                // The session went to another start of it than the description came from.
                if stale {
                    return Err(LinkError::Restarted);
                }
            }
            Frame::State(change) => {
                tracing::info!(
                    worker = %self.worker.address,
                    state = change.state().as_str_name(),
                    "worker changed"
                );
                connected.set_state(change.state());
                self.cluster.changed();
            }
            Frame::Pong(pong) => {
                dog.hear_step(pong.step);
                dog.hear_expected(Duration::from_millis(pong.expected_step_ms.into()));
                if let Some(load) = pong.load {
                    connected.set_load(load);
                }
            }
        }
        Ok(())
    }

    /// The worker gets nothing new, and what it has moves where it can.
    fn suspect(
        &self,
        connected: &Arc<Connected>,
        suspicion: Suspicion,
        time: Duration,
    ) -> Result<(), LinkError> {
        if connected.set_suspected(true) {
            tracing::warn!(worker = %self.worker.address, ?suspicion, "worker suspected");
            self.cluster.metrics.suspicions.inc();
            self.worker.breaker.fail();
            self.cluster.changed();
        }
        if time > LONGEST_SUSPICION {
            return Err(LinkError::Lifeless(suspicion, time));
        }
        if connected.session.placed().sequences > 0 && self.cluster.has_other(connected) {
            connected.session.evict();
        }
        Ok(())
    }

    /// Keeps the index of the worker's prefix cache, for as long as that is the worker described.
    async fn follow(
        &self,
        connected: &Connected,
        mut client: WorkerClient<Channel>,
    ) -> Result<Infallible, LinkError> {
        loop {
            match follow_once(connected, &mut client).await {
                Err(LinkError::Restarted) => return Err(LinkError::Restarted),
                Err(LinkError::Status(status)) if status.code() == Code::Unimplemented => {
                    // Placement goes without.
                    return std::future::pending().await;
                }
                Err(error) => {
                    tracing::debug!(worker = %self.worker.address, %error, "bulk stream lost");
                }
                Ok(()) => {}
            }
            tokio::time::sleep(LONGEST_BACKOFF).await;
        }
    }
}

/// One stream of changes, until it ends.
async fn follow_once(
    connected: &Connected,
    client: &mut WorkerClient<Channel>,
) -> Result<(), LinkError> {
    let (ask, mut asked) = mpsc::channel(1);
    let follow = || BulkRequest {
        request: Some(bulk_request::Request::FollowPages(FollowPages {})),
    };
    let requests = async_stream::stream! {
        yield follow();
        while let Some(request) = asked.recv().await {
            yield request;
        }
    };
    let mut frames = client.bulk(requests).await?.into_inner();
    while let Some(frame) = frames.message().await? {
        let Some(bulk_frame::Frame::Pages(batch)) = frame.frame else {
            continue;
        };
        match connected.pages.apply(&batch) {
            Ok(()) => {}
            Err(gap @ Gap::Lost) => {
                tracing::debug!(%gap, "a snapshot is asked for");
                // Where one is asked for already, it will do.
                let _ = ask.try_send(follow());
            }
            Err(Gap::Foreign) => return Err(LinkError::Restarted),
        }
    }
    Ok(())
}

struct CloseOnDrop(Arc<Session>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}
