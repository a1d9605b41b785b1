//! What the mock answers to each call.

use std::sync::Arc;

use futures::{StreamExt, stream::BoxStream};
use prost::Message as _;
use shoal_proto::{
    PROTOCOL_VERSION,
    worker::{
        BulkFrame, BulkRequest, Chunk, CorpusPosition, CorpusRecord, DescribeRequest, DrainRequest,
        DrainResponse, FetchTokenizerRequest, ModelDescription, PageBatch, RouterFrame,
        UndrainRequest, UndrainResponse, WorkerFrame, WorkerState, bulk_frame,
        worker_server::Worker,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{CONTEXT, Seen, Shared, session::Session, tokenizer_sha256};
use crate::bundle::bundle;

pub(super) struct Service(pub(super) Arc<Shared>);

/// Tells of the end of a router's log when it is dropped.
struct CorpusEnd(mpsc::UnboundedSender<Seen>);

impl Drop for CorpusEnd {
    fn drop(&mut self) {
        self.0.send(Seen::CorpusEnd).ok();
    }
}

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
        let script = self.0.script.lock().unwrap().clone();
        Ok(Response::new(ModelDescription {
            protocol_version: PROTOCOL_VERSION,
            features: vec!["erasures".into()],
            model: script.model,
            architecture: "mock".into(),
            quantization: "none".into(),
            context_length: CONTEXT,
            vocab_size: bundle().tokens.len() as u32,
            tokenizer_sha256: tokenizer_sha256(),
            numerics_id: b"mock".to_vec(),
            epoch: *self.0.epoch.borrow(),
            drafts: script.drafts,
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
        let session = Session::new(self.0.clone(), down);
        tokio::spawn(session.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(frames).boxed()))
    }

    async fn corpus(
        &self,
        request: Request<Streaming<CorpusRecord>>,
    ) -> Result<Response<Self::CorpusStream>, Status> {
        let (records, end) = (request.into_inner(), CorpusEnd(self.0.seen.clone()));
        let first = futures::stream::iter([Ok(CorpusPosition::default())]);
        // Every record is one, the first included: it says whose log this is.
        let rest = records.filter_map(move |record| {
            if let Ok(record) = record {
                end.0.send(Seen::Corpus(Box::new(record))).ok();
            }
            std::future::ready(None)
        });
        Ok(Response::new(first.chain(rest).boxed()))
    }

    async fn bulk(
        &self,
        request: Request<Streaming<BulkRequest>>,
    ) -> Result<Response<Self::BulkStream>, Status> {
        if !self.0.script.lock().unwrap().pages {
            return Err(Status::unimplemented("as an older worker"));
        }
        let (mut asked, mut epoch) = (request.into_inner(), self.0.epoch.subscribe());
        // A snapshot whenever one is asked for, and at a new start.
        let frames = async_stream::stream! {
            loop {
                tokio::select! {
                    asked = asked.message() => if !matches!(asked, Ok(Some(_))) {
                        return;
                    },
                    _ = epoch.changed() => {}
                }
                let pages = PageBatch {
                    epoch: *epoch.borrow_and_update(),
                    snapshot_begin: true,
                    snapshot_end: true,
                    ..PageBatch::default()
                };
                let frame = Some(bulk_frame::Frame::Pages(pages));
                yield Ok(BulkFrame { frame });
            }
        };
        Ok(Response::new(frames.boxed()))
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
