//! The stream of what the prefix cache holds.

use shoal_core::{Namespace, PAGE_TOKENS, prompt_pages};
use shoal_proto::worker::{
    BulkFrame, BulkRequest, FollowPages, PageBatch, bulk_frame::Frame, bulk_request::Request,
    page_event::Event,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    fake::NUMERICS,
    rig::{Rig, in_time, submit},
};

async fn batch(frames: &mut Streaming<BulkFrame>) -> PageBatch {
    match in_time(frames.message()).await.unwrap().unwrap().frame {
        Some(Frame::Pages(batch)) => batch,
        other => panic!("{other:?}"),
    }
}

/// The hashes that a batch says were stored.
fn stored(batch: &PageBatch) -> Vec<u8> {
    let events = batch.events.iter().map(|event| match &event.event {
        Some(Event::Stored(hashes)) => hashes.clone(),
        other => panic!("{other:?}"),
    });
    events.collect::<Vec<_>>().concat()
}

#[tokio::test]
async fn a_follower_hears_of_every_prompt_page() {
    let rig = Rig::start().await;
    let mut client = rig.client();
    let (send, requests) = mpsc::channel(4);
    let follow = BulkRequest {
        request: Some(Request::FollowPages(FollowPages {})),
    };
    send.send(follow).await.unwrap();
    let frames = in_time(client.bulk(ReceiverStream::new(requests))).await;
    let mut frames = frames.unwrap().into_inner();
    let empty = batch(&mut frames).await;
    assert!(empty.snapshot_begin && empty.snapshot_end && stored(&empty).is_empty());

    let prompt: Vec<u32> = (0..2 * PAGE_TOKENS as u32 + 6).map(|i| i % 60).collect();
    let namespace = Namespace::new("tenant", "");
    let mut session = rig.session().await;
    let mut long = submit(1, &prompt, 1);
    long.cache_namespace = namespace.as_bytes().to_vec();
    session.submit(long).await;
    session.answer(1).await;
    let news = batch(&mut frames).await;
    let expected: Vec<u8> = prompt_pages(&namespace, &NUMERICS, &prompt)
        .flat_map(|page| page.to_bytes())
        .collect();
    assert_eq!(expected.len(), 32);
    assert_eq!(stored(&news), expected);
    assert_eq!((news.seq, news.epoch), (empty.seq, empty.epoch));

    send.send(follow).await.unwrap();
    let again = batch(&mut frames).await;
    assert!(again.snapshot_begin && again.snapshot_end);
    assert_eq!(again.seq, news.seq + 2);
    assert_eq!(stored(&again).len(), 32);
    rig.end().await.unwrap();
}
