//! The second stream of a router: what need not keep up with the tokens.

use std::sync::Arc;

use futures::Stream;
use shoal_proto::worker::{BulkFrame, BulkRequest, bulk_frame::Frame, bulk_request::Request};
use tonic::{Status, Streaming};

use crate::worker::{Serving, Worker};

/// Answers a router's requests until either side ends.
pub(crate) fn start(
    worker: Arc<Worker>,
    serving: Arc<Serving>,
    mut requests: Streaming<BulkRequest>,
) -> impl Stream<Item = Result<BulkFrame, Status>> + Send + 'static {
    async_stream::try_stream! {
        let closing = worker.closing.clone();
        let mut follower = worker.pages.follow(serving.identity.epoch);
        let mut following = false;
        loop {
            let request = tokio::select! {
                biased;
                () = closing.cancelled() => return,
                request = requests.message() => request,
                batches = follower.news(), if following => {
                    for batch in batches {
                        yield BulkFrame { frame: Some(Frame::Pages(batch)) };
                    }
                    continue;
                }
            };
            match request? {
                None => return,
                Some(BulkRequest { request: Some(Request::FollowPages(_)) }) => {
                    follower.restart();
                    following = true;
                }
                // A request of a newer router.
                Some(BulkRequest { request: None }) => {}
            }
        }
    }
}
