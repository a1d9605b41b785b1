//! The calls beside the session, and the probes.

use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use shoal_core::PAGE_TOKENS;
use shoal_proto::worker::{
    DescribeRequest, DrainRequest, FetchTokenizerRequest, Finish, ModelDescription, RejectReason,
    TokenizerBundle, UndrainRequest, WorkerState, worker_frame,
};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    fake::{CONTEXT, NUMERICS, VOCAB, answer},
    rig::{Rig, Session, in_time, submit, tokenizer},
};

impl Rig {
    pub(crate) async fn description(&self) -> ModelDescription {
        let description = in_time(self.client().describe(DescribeRequest {})).await;
        description.unwrap().into_inner()
    }

    pub(crate) async fn health(&self) -> ServingStatus {
        let request = HealthCheckRequest::default();
        let mut client = HealthClient::new(self.channel());
        let response = in_time(client.check(request)).await;
        response.unwrap().into_inner().status()
    }

    /// The pieces of the tokenizer that has this hash.
    pub(crate) async fn tokenizer(&self, sha256: Vec<u8>) -> Result<Vec<Vec<u8>>, Status> {
        let request = FetchTokenizerRequest { sha256 };
        let mut client = self.client();
        let mut chunks = in_time(client.fetch_tokenizer(request)).await?.into_inner();
        let mut pieces = Vec::new();
        while let Some(chunk) = in_time(chunks.message()).await? {
            pieces.push(chunk.data);
        }
        Ok(pieces)
    }
}

#[tokio::test]
async fn the_model_is_described() {
    let rig = Rig::start().await;
    let description = rig.description().await;
    let expected = ModelDescription {
        protocol_version: shoal_proto::PROTOCOL_VERSION,
        features: vec!["erasures".into()],
        model: "fake".into(),
        architecture: "llama".into(),
        quantization: "F32".into(),
        context_length: CONTEXT as u32,
        vocab_size: VOCAB as u32,
        page_size: PAGE_TOKENS as u32,
        pages: 512,
        tensor_parallel: 1,
        backend: "fake".into(),
        numerics_id: NUMERICS.into(),
        state: WorkerState::Ready.into(),
        epoch: description.epoch,
        drafts: false,
        tokenizer_sha256: description.tokenizer_sha256.clone(),
    };
    assert_eq!(description, expected);
    let next = Rig::start().await;
    assert!(next.description().await.epoch > description.epoch);
}

#[tokio::test]
async fn the_tokenizer_comes_in_pieces_by_its_hash() {
    let rig = Rig::start().await;
    let sha256 = rig.description().await.tokenizer_sha256;
    let pieces = rig.tokenizer(sha256.clone()).await.unwrap();
    assert!(pieces.len() > 1 && pieces.iter().all(|piece| piece.len() <= 256 << 10));
    let bundle = pieces.concat();
    assert_eq!(Sha256::digest(&bundle).to_vec(), sha256);
    let decoded: TokenizerBundle = prost::Message::decode(bundle.as_slice()).unwrap();
    assert_eq!(decoded, tokenizer());

    let status = rig.tokenizer(vec![0; 32]).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

async fn state(session: &mut Session) -> WorkerState {
    let change = session.next(|frame| match frame {
        worker_frame::Frame::State(change) => Some(change.state()),
        _ => None,
    });
    change.await
}

#[tokio::test]
async fn draining_lets_the_running_finish_and_takes_no_more() {
    let rig = Rig::start().await;
    let mut client = rig.client();
    let mut session = rig.session().await;
    assert_eq!(state(&mut session).await, WorkerState::Ready);
    rig.control.hold();
    session.submit(submit(1, &[1], 30)).await;
    session.ping(1).await;
    let drain = DrainRequest { deadline_ms: 0 };
    in_time(client.drain(drain)).await.unwrap();
    in_time(client.drain(drain)).await.unwrap();
    assert_eq!(state(&mut session).await, WorkerState::Draining);
    assert_eq!(rig.description().await.state(), WorkerState::Draining);
    assert_eq!(rig.get("/ready").await, (503, "draining\n".into()));
    assert_eq!(rig.get("/health").await.0, 503);
    assert_eq!(rig.get("/live").await.0, 200);
    in_time(async { while rig.health().await != ServingStatus::NotServing {} }).await;

    session.submit(submit(2, &[1], 30)).await;
    let rejected = session.rejected().await;
    assert_eq!(
        (rejected.sequence, rejected.reason()),
        (2, RejectReason::Draining)
    );
    rig.control.release();
    let (tokens, last) = session.answer(1).await;
    assert_eq!((tokens, last.finish()), (answer(&[1], 30), Finish::Length));

    in_time(client.undrain(UndrainRequest {})).await.unwrap();
    assert_eq!(state(&mut session).await, WorkerState::Ready);
    assert_eq!(rig.get("/ready").await, (200, "ready\n".into()));
    in_time(async { while rig.health().await != ServingStatus::Serving {} }).await;
    session.submit(submit(3, &[1], 30)).await;
    assert_eq!(session.answer(3).await.0, answer(&[1], 30));
}

#[tokio::test]
async fn what_is_left_at_the_drain_s_deadline_is_preempted() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    rig.control.hold();
    session.submit(submit(1, &[1], CONTEXT as u32)).await;
    session.ping(1).await;
    let drain = DrainRequest { deadline_ms: 1 };
    in_time(rig.client().drain(drain)).await.unwrap();
    let deadline = Instant::now() + Duration::from_millis(1);
    while Instant::now() <= deadline {
        session.ping(2).await;
    }
    rig.control.release();
    loop {
        if let Some(last) = session.outputs().await.pop()
            && last.finish() != Finish::Unspecified
        {
            assert_eq!(last.finish(), Finish::Preempted);
            break;
        }
    }
}

#[tokio::test]
async fn metrics_are_served() {
    let rig = Rig::start().await;
    rig.description().await;
    let (status, text) = rig.get("/metrics").await;
    assert_eq!(status, 200);
    for name in ["shoal_engine_running_sequences", "shoal_worker_sessions"] {
        assert!(text.contains(name), "{text}");
    }
}
