//! The whole worker on the demo model.

use std::path::PathBuf;

use sha2::{Digest, Sha256};
use shoal_proto::worker::{DrainRequest, Finish, Submit, TokenizerBundle, WorkerState};

use super::rig::{self, Rig, Session, in_time, submit};
use crate::WorkerConfig;

/// The model's end of a turn.
const END: u32 = 2;

fn model_path() -> PathBuf {
    let cache = || {
        let home = PathBuf::from(std::env::var_os("HOME").unwrap());
        home.join(".cache/shoal/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    let path = std::env::var_os("SHOAL_TEST_MODEL").map_or_else(cache, PathBuf::from);
    assert!(
        path.exists(),
        "no demo model at {}: run tests/run",
        path.display()
    );
    path
}

/// A worker with a KV pool that 32 conversations nearly fill.
async fn worker() -> Rig {
    let config = WorkerConfig {
        model: model_path(),
        name: Some("demo".into()),
        kv_bytes: Some(64 << 20),
        max_sessions: 1000,
        ..rig::config()
    };
    Rig::running(config).await
}

/// A prompt of a conversation, and its greedy answer in float32. Its first token is nearly
/// tied with 60; of the others float32 is sure.
fn reference() -> (Vec<u32>, Vec<u32>) {
    let text = include_str!("../../../tests/data/greedy-f32.json");
    let cases: serde_json::Value = serde_json::from_str(text).unwrap();
    let ids = |name: &str| serde_json::from_value(cases[0][name].clone()).unwrap();
    (ids("prompt_ids"), ids("reference_ids"))
}

/// A submission that ends with the turn.
fn turn(sequence: u64, prompt: &[u32], max_tokens: u32) -> Submit {
    let mut turn = submit(sequence, prompt, max_tokens);
    turn.stopping.as_mut().unwrap().stop_token_ids = vec![END];
    turn
}

/// A submission that draws its tokens.
fn seeded(sequence: u64, prompt: &[u32], seed: u64) -> Submit {
    let mut seeded = submit(sequence, prompt, 24);
    seeded.sampling.as_mut().unwrap().temperature = 1.0;
    seeded.seed = seed;
    seeded
}

#[tokio::test]
async fn the_demo_model_is_described_and_its_tokenizer_sent() {
    let rig = worker().await;
    let description = rig.description().await;
    assert_eq!(description.model, "demo");
    assert_eq!(description.architecture, "llama");
    assert_eq!(description.quantization, "Q4_1");
    assert_eq!(description.vocab_size, 49152);
    assert_eq!(description.backend, "cpu");
    assert_eq!(description.state(), WorkerState::Ready);
    let pool = description.pages * description.page_size;
    assert_eq!(description.context_length, pool.min(8192));
    let pieces = rig.tokenizer(description.tokenizer_sha256.clone()).await;
    let bundle = pieces.unwrap().concat();
    assert_eq!(
        Sha256::digest(&bundle).to_vec(),
        description.tokenizer_sha256
    );
    let bundle: TokenizerBundle = prost::Message::decode(bundle.as_slice()).unwrap();
    assert_eq!(bundle.tokens.len(), 49152);
    assert!(bundle.end_tokens.contains(&END));
    rig.end().await.unwrap();
}

#[tokio::test]
async fn a_greedy_answer_is_that_of_float32() {
    let rig = worker().await;
    let (prompt, expected) = reference();
    let mut session = rig.session().await;
    session.submit(turn(1, &prompt, 32)).await;
    let (tokens, _) = session.answer(1).await;
    assert!([expected[0], 60].contains(&tokens[0]), "{tokens:?}");
    let mut resumed = turn(2, &prompt, 32);
    resumed.resume = expected[..1].into();
    session.submit(resumed).await;
    let (tokens, last) = session.rest(2, 1).await;
    assert_eq!((&tokens[..], last.finish()), (&expected[1..], Finish::Stop));
    rig.end().await.unwrap();
}

#[tokio::test]
async fn a_seed_gives_the_same_answer_in_any_company() {
    let rig = worker().await;
    let (prompt, _) = reference();
    let mut session = rig.session().await;
    session.submit(seeded(1, &prompt, 7)).await;
    let (alone, _) = session.answer(1).await;
    assert_eq!(alone.len(), 24);
    session.submit(seeded(2, &prompt, 7)).await;
    assert_eq!(session.answer(2).await.0, alone);

    // Prompts of many lengths, some of which share its pages.
    for other in 0..31 {
        let (start, end) = (other % 3 * 7, prompt.len() - other % 5);
        let other = seeded(100 + other as u64, &prompt[start..end], other as u64);
        session.submit(other).await;
    }
    session.submit(seeded(3, &prompt, 7)).await;
    assert_eq!(session.answer(3).await.0, alone);
    session.submit(seeded(4, &prompt, 8)).await;
    assert_ne!(session.answer(4).await.0, alone, "another seed");
    rig.end().await.unwrap();
}

#[tokio::test]
async fn a_thousand_vanishing_sessions_leave_no_page_held() {
    let rig = worker().await;
    let mut client = rig.client();
    let (mut prompt, _) = reference();
    let mut session = rig.session().await;
    session.submit(turn(1, &prompt, 32)).await;
    let (before, _) = session.answer(1).await;
    drop(session);
    for round in 0..1000u32 {
        prompt[5] = round;
        let mut session = Session::open(&mut client).await;
        session.submit(submit(1, &prompt, 1000)).await;
        if round % 50 == 0 {
            session.outputs().await;
        }
    }
    rig.until_empty().await;
    let mut session = rig.session().await;
    session.submit(turn(1, &reference().0, 32)).await;
    assert_eq!(session.answer(1).await.0, before);

    let drained = in_time(client.drain(DrainRequest { deadline_ms: 0 })).await;
    assert_eq!(drained.unwrap().into_inner().running, 0);
    assert_eq!(rig.get("/ready").await, (503, "draining\n".into()));
    rig.end().await.unwrap();
}
