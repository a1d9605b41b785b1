//! Text that drafts: what workers are told, of whom, and what they no longer are.

use serde_json::json;
use shoal_core::{DraftScope, Subject};
use shoal_proto::inference::{
    DropTextRequest, EraseAnswersRequest, ListTextsRequest, LoadTextRequest,
    corpus_client::CorpusClient,
};

use crate::{
    mock::{MODEL, Mock, Script, tokenizer_sha256},
    support::Router,
};

const ANSWER: &str = "Your parcel is on its way to you.";

fn tenant() -> DraftScope {
    DraftScope::tenant(MODEL, &tokenizer_sha256(), "default", "")
}

#[tokio::test]
async fn answers_are_told_to_workers_and_shared_once_three_users_had_them() {
    let mut mock = Mock::start(Script::answer(ANSWER)).await;
    let router = Router::ready(&[&mock]).await;
    // Without a user nobody is told.
    router.chat(json!({})).await;
    for user in ["a", "b", "c"] {
        router.chat(json!({"user": user})).await;
        let own = mock.text().await;
        assert_eq!(own.scope, tenant().user(user).as_bytes());
        assert!(own.tokens.len() >= ANSWER.len());
    }
    let shared = mock.text().await;
    assert_eq!(shared.scope, tenant().as_bytes());
    assert!(shared.tokens.len() >= ANSWER.len());
}

#[tokio::test]
async fn public_text_is_loaded_listed_and_dropped() {
    let mut mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    let mut client = CorpusClient::new(router.channel().await);
    let load = LoadTextRequest {
        name: "faq".into(),
        text: "Parcels come within five days.".into(),
        model: String::new(),
    };
    let tokens = client.load_text(load).await.unwrap().into_inner().tokens;
    let told = mock.text().await;
    assert_eq!(told.scope, tenant().public().as_bytes());
    assert_eq!(told.tokens.len(), tokens as usize);
    let listed = client.list_texts(ListTextsRequest {}).await.unwrap();
    let listed = listed.into_inner().texts;
    assert_eq!((&*listed[0].name, listed[0].tokens), ("faq", tokens));
    let drop = DropTextRequest { name: "faq".into() };
    client.drop_text(drop.clone()).await.unwrap();
    assert!(client.drop_text(drop).await.is_err());
    let erased = mock.erased().await;
    assert_eq!(erased.scope, tenant().public().as_bytes());
}

#[tokio::test]
async fn a_user_s_answers_are_erased() {
    let mut mock = Mock::start(Script::answer(ANSWER)).await;
    let router = Router::ready(&[&mock]).await;
    router.chat(json!({"user": "a"})).await;
    mock.text().await;
    let mut client = CorpusClient::new(router.channel().await);
    let erase = EraseAnswersRequest { user: "a".into() };
    client.erase_answers(erase).await.unwrap();
    let subject = Subject::tenant("default");
    let erased = mock.erased().await;
    assert_eq!(erased.tenant, subject.as_bytes());
    assert_eq!(erased.user, subject.user("a").as_bytes());
    assert!(erased.scope.is_empty());
}

#[tokio::test]
async fn the_log_of_a_lost_session_ends() {
    let mut mock = Mock::start(Script::answer(ANSWER)).await;
    let router = Router::ready(&[&mock]).await;
    router.chat(json!({"user": "a"})).await;
    mock.text().await;
    // The session breaks, its connection does not.
    mock.crash();
    mock.corpus_end().await;
    mock.text().await;
}
