//! A small model, requests to it and a cluster that serves it, for unit tests.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use prost::Message as _;
use sha2::{Digest, Sha256};
use shoal_draft::LedgerConfig;
use shoal_fabric::{
    membership::{Member, View},
    metrics::Registry,
};
use shoal_proto::{
    inference::{GenerateRequest, TokenIds, generate_request::Prompt},
    worker::{
        ModelDescription, RejectReason, Rejected, RouterFrame, SequenceOutput, StepOutput, Submit,
        WorkerState, router_frame::Frame, worker_client::WorkerClient,
    },
};
use tokio::time::Instant;
use tonic::transport::Endpoint;

use crate::{
    cluster::Cluster,
    corpus::Corpora,
    keys::{Caller, Tenant},
    metrics::Metrics,
    model::{BundleHash, Model, TextCache},
    placement::Routing,
    request::{Arrival, Job},
    session::Session,
    worker::{Connected, Worker},
};

#[path = "../tests/router/bundle.rs"]
mod bundle;

pub(crate) use bundle::END;

/// A token of several characters; the others are bytes.
pub(crate) const WORD: u32 = 259;
/// The text of [`WORD`].
pub(crate) const WORD_TEXT: &str = "wxyz";

/// Between the pings of a session.
const PING: Duration = Duration::from_secs(5);

/// The encoded bundle of the byte-level model with one [`WORD`] more, and its hash.
pub(crate) fn bundle() -> (Vec<u8>, BundleHash) {
    let mut bundle = bundle::bundle();
    bundle.tokens.push(WORD_TEXT.into());
    bundle.token_types.push(1);
    let encoded = bundle.encode_to_vec();
    let hash = Sha256::digest(&encoded).into();
    (encoded, hash)
}

/// The model of that [`bundle`], as a worker has it.
pub(crate) fn model_with(change: impl FnOnce(&mut ModelDescription)) -> Arc<Model> {
    let (encoded, hash) = bundle();
    let mut description = ModelDescription {
        model: "tiny".into(),
        context_length: 512,
        vocab_size: WORD + 1,
        tokenizer_sha256: hash.to_vec(),
        state: WorkerState::Ready as i32,
        ..ModelDescription::default()
    };
    change(&mut description);
    let text = TextCache::default().add(&encoded, hash).unwrap();
    Arc::new(Model::new(description, text, 0))
}

/// A job of the request, whose prompt is `ab` where it has none.
pub(crate) async fn job(mut request: GenerateRequest) -> Arc<Job> {
    let ids = b"ab".map(u32::from).to_vec();
    let prompt = Prompt::TokenIds(TokenIds { ids });
    request.prompt.get_or_insert(prompt);
    let now = Instant::now();
    let arrival = Arrival {
        caller: Caller {
            tenant: Arc::new(Tenant::unlimited("t")),
            user: "".into(),
            router: false,
            operator: false,
        },
        request_id: "r".into(),
        at: now,
        deadline: now + Duration::from_secs(60),
    };
    let job = Job::new(request, arrival, model_with(|_| {}), None).await;
    Arc::new(job.unwrap())
}

/// A cluster without links.
pub(crate) fn cluster() -> Arc<Cluster> {
    let metrics = Metrics::new(&Registry::default());
    let corpora = Corpora::new(LedgerConfig::default(), metrics.clone());
    Arc::new(Cluster::new(Routing::Cost, metrics, Arc::new(corpora)))
}

/// A worker that the test plays.
pub(crate) struct Played {
    pub(crate) worker: Arc<Worker>,
    pub(crate) connected: Arc<Connected>,
    frames: BoxStream<'static, RouterFrame>,
}

impl Played {
    /// Joins the cluster, serving a model.
    pub(crate) fn join(cluster: &Cluster, model: Arc<Model>) -> Self {
        let known = cluster.workers();
        let address = format!("worker-{}:1", known.len()).parse().unwrap();
        let members = known.iter().map(|worker| Member::clone(&worker.member()));
        let view = View {
            workers: members.chain([Member::at(address)]).collect(),
            ..View::default()
        };
        let worker = cluster.follow(&view).remove(0);
        let (session, frames) = Session::new(PING);
        // Never dialled: the session's frames are all that there is.
        let channel = Endpoint::from_static("http://unreachable").connect_lazy();
        let connected = Connected::new(model, session, WorkerClient::new(channel));
        let connected = Arc::new(connected);
        cluster.connect(&worker, connected.clone());
        Self {
            worker,
            connected,
            frames: frames.boxed(),
        }
    }

    /// The next submission.
    pub(crate) async fn submitted(&mut self) -> Submit {
        loop {
            let frame = self.frames.next().await.unwrap().frame;
            if let Some(Frame::Submit(submit)) = frame {
                return submit;
            }
        }
    }

    /// Refuses a submission.
    pub(crate) fn reject(&self, submit: &Submit, reason: RejectReason) {
        self.connected.session.reject(Rejected {
            sequence: submit.sequence,
            attempt: submit.attempt,
            reason: reason as i32,
            ..Rejected::default()
        });
    }

    /// Makes the first tokens of a submission's output.
    pub(crate) fn make(&self, submit: &Submit, tokens: &[u32]) {
        let output = SequenceOutput {
            sequence: submit.sequence,
            attempt: submit.attempt,
            tokens: tokens.to_vec(),
            ..SequenceOutput::default()
        };
        self.connected.session.deliver(StepOutput {
            sequences: vec![output],
            ..StepOutput::default()
        });
    }
}
