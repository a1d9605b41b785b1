//! The gRPC service `shoal.worker.v1.Worker`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, stream};
use shoal_proto::worker::{
    BulkFrame, BulkRequest, Chunk, CorpusPosition, CorpusRecord, DescribeRequest, DrainRequest,
    DrainResponse, FetchTokenizerRequest, ModelDescription, RouterFrame, UndrainRequest,
    UndrainResponse, WorkerFrame, worker_server,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    bulk, corpus, session,
    sessions::Full,
    worker::{Closing, Worker},
};

/// Bytes of a piece of the tokenizer bundle.
const CHUNK: usize = 256 << 10;

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(crate) struct Service(pub(crate) Arc<Worker>);

impl From<Closing> for Status {
    fn from(closing: Closing) -> Self {
        Self::unavailable(closing.to_string())
    }
}

impl From<Full> for Status {
    fn from(full: Full) -> Self {
        Self::resource_exhausted(full.to_string())
    }
}

#[tonic::async_trait]
impl worker_server::Worker for Service {
    type FetchTokenizerStream = Frames<Chunk>;
    type SessionStream = Frames<WorkerFrame>;
    type BulkStream = Frames<BulkFrame>;
    type CorpusStream = Frames<CorpusPosition>;

    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<ModelDescription>, Status> {
        let mut description = self.0.serving().await?.description.clone();
        description.set_state(self.0.state());
        Ok(Response::new(description))
    }

    async fn fetch_tokenizer(
        &self,
        request: Request<FetchTokenizerRequest>,
    ) -> Result<Response<Self::FetchTokenizerStream>, Status> {
        let serving = self.0.serving().await?;
        if request.get_ref().sha256 != serving.description.tokenizer_sha256 {
            return Err(Status::not_found("no tokenizer has this hash"));
        }
        let mut rest = serving.bundle.clone();
        let chunks = std::iter::from_fn(move || {
            let data = rest.split_to(rest.len().min(CHUNK)).to_vec();
            (!data.is_empty()).then_some(Ok(Chunk { data }))
        });
        Ok(Response::new(Box::pin(stream::iter(chunks))))
    }

    async fn session(
        &self,
        request: Request<Streaming<RouterFrame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let worker = self.0.clone();
        let serving = worker.serving().await?;
        let seat = worker.sessions.open()?;
        let frames = session::start(worker, serving, seat, request.into_inner());
        Ok(Response::new(Box::pin(frames)))
    }

    async fn bulk(
        &self,
        request: Request<Streaming<BulkRequest>>,
    ) -> Result<Response<Self::BulkStream>, Status> {
        let worker = self.0.clone();
        let serving = worker.serving().await?;
        let frames = bulk::start(worker, serving, request.into_inner());
        Ok(Response::new(Box::pin(frames)))
    }

    async fn corpus(
        &self,
        request: Request<Streaming<CorpusRecord>>,
    ) -> Result<Response<Self::CorpusStream>, Status> {
        let positions = corpus::follow(self.0.clone(), request.into_inner());
        Ok(Response::new(Box::pin(positions)))
    }

    async fn drain(
        &self,
        request: Request<DrainRequest>,
    ) -> Result<Response<DrainResponse>, Status> {
        let serving = self.0.serving().await?;
        let deadline = Duration::from_millis(request.get_ref().deadline_ms.into());
        self.0
            .drain(&serving, (!deadline.is_zero()).then_some(deadline));
        let load = serving.engine.load();
        Ok(Response::new(DrainResponse {
            running: load.running,
            waiting: load.waiting,
        }))
    }

    async fn undrain(
        &self,
        _: Request<UndrainRequest>,
    ) -> Result<Response<UndrainResponse>, Status> {
        let serving = self.0.serving().await?;
        self.0.undrain(&serving)?;
        Ok(Response::new(UndrainResponse {}))
    }
}
