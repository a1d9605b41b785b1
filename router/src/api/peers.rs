//! `shoal.router.v1`: the other routers' door.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use shoal_proto::router::{FollowRequest, LogBatch, router_server};
use tonic::{Request, Response, Status, Streaming};

use super::context::Context;
use crate::{corpus::Corpora, error::RequestError, service::Service};

/// The gRPC service.
#[derive(Debug)]
pub(crate) struct Peers(pub(super) Arc<Service>);

#[tonic::async_trait]
impl router_server::Router for Peers {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<LogBatch, Status>> + Send>>;

    async fn follow(
        &self,
        mut request: Request<Streaming<FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let context = request.extensions_mut().remove::<Context>();
        let context = context.ok_or(RequestError::Unauthenticated);
        let admitted = context.and_then(|context| context.authorize_router());
        admitted.inspect_err(|error| self.0.metrics.rejected(error.code()))?;
        let corpora = self.0.cluster.corpora.clone();
        let batches = follow(corpora, request.into_inner());
        Ok(Response::new(Box::pin(batches)))
    }
}

/// Tells another router what it lacks, and what is new, until either side ends.
fn follow(
    corpora: Arc<Corpora>,
    mut asked: Streaming<FollowRequest>,
) -> impl Stream<Item = Result<LogBatch, Status>> + Send + 'static {
    async_stream::try_stream! {
        let closing = corpora.closing.clone();
        let first = closing.run_until_cancelled(asked.message()).await;
        let Some(first) = first.transpose()?.flatten() else { return };
        let origin = first.origin;
        let mut positions = first.positions.into_iter().collect();
        // Of all logs once, when it asks.
        let mut all = true;
        let mut changes = corpora.watch();
        loop {
            changes.mark_unchanged();
            let batch = corpora.batch(&mut positions, all);
            let entries = batch.entries.len();
            if all || entries > 0 {
                yield batch;
                corpora.sent(origin, entries);
            }
            if entries > 0 {
                continue;
            }
            all = false;
            let request = tokio::select! {
                () = closing.cancelled() => return,
                Ok(()) = changes.changed() => continue,
                request = asked.message() => request,
            };
            let Some(request) = request? else { return };
            positions = request.positions.into_iter().collect();
            all = true;
        }
    }
}
