//! Routers that follow each other's logs of text that drafts.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use sha2::{Digest, Sha256};
use shoal_core::{DraftScope, Subject};
use shoal_fabric::membership::{Endpoint, Member, Membership, Role, View};
use shoal_proto::inference::{
    DropTextRequest, EraseAnswersRequest, ListTextsRequest, LoadTextRequest,
    corpus_client::CorpusClient,
};
use shoal_router::RouterArgs;
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::{
    mock::{MODEL, Mock, Script, tokenizer_sha256},
    support::{Router, args},
};

const ANSWER: &str = "Your parcel is on its way to you.";

/// Tells every router of all routers.
#[derive(Clone, Debug, Default)]
struct Told(watch::Sender<Arc<View>>);

impl Membership for Told {
    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.0.subscribe()
    }
}

impl Told {
    fn of(mocks: &[&Mock]) -> Self {
        let workers = mocks.iter();
        let workers = workers.map(|mock| Member::at(Endpoint::try_from(mock.address).unwrap()));
        let view = View {
            workers: workers.collect(),
            routers: Vec::new(),
        };
        Self(watch::Sender::new(Arc::new(view)))
    }

    fn args(&self) -> RouterArgs {
        RouterArgs {
            membership: Some(Arc::new(self.clone())),
            ..args(&[])
        }
    }

    /// These are the routers from now on.
    fn set(&self, routers: &[&Router]) {
        let members = routers.iter().map(|router| {
            let address: Endpoint = router.base["http://".len()..].parse().unwrap();
            Member::new(Role::Router, address.to_string(), address)
        });
        let routers = members.collect();
        self.0.send_modify(|view| {
            *view = Arc::new(View {
                routers,
                workers: view.workers.clone(),
            });
        });
    }
}

fn tenant() -> DraftScope {
    DraftScope::tenant(MODEL, &tokenizer_sha256(), "default", "")
}

async fn corpus(router: &Router) -> CorpusClient<Channel> {
    CorpusClient::new(router.channel().await)
}

async fn load(router: &Router, name: &str) {
    let request = LoadTextRequest {
        name: name.into(),
        text: "Parcels come within five days.".into(),
        model: String::new(),
    };
    corpus(router).await.load_text(request).await.unwrap();
}

/// Waits until a router lists just these public texts.
async fn lists(router: &Router, names: &[&str]) {
    let mut client = corpus(router).await;
    let wait = async {
        loop {
            let listed = client.list_texts(ListTextsRequest {}).await.unwrap();
            let texts = listed.into_inner().texts;
            if texts
                .iter()
                .map(|text| &*text.name)
                .eq(names.iter().copied())
            {
                return;
            }
        }
    };
    let reached = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(reached.is_ok(), "{names:?} were never listed");
}

/// Two routers that follow each other: the text of each is known to the other.
async fn pair(told: &Told) -> [Router; 2] {
    let (one, two) = (
        Router::ready_with(told.args()).await,
        Router::ready_with(told.args()).await,
    );
    told.set(&[&one, &two]);
    load(&one, "from one").await;
    lists(&two, &["from one"]).await;
    load(&two, "from two").await;
    lists(&one, &["from one", "from two"]).await;
    [one, two]
}

#[tokio::test]
async fn users_of_all_routers_count_together() {
    let mut mock = Mock::start(Script::answer(ANSWER)).await;
    let told = Told::of(&[&mock]);
    let [one, two] = pair(&told).await;
    for (router, user) in [(&one, "a"), (&two, "b"), (&one, "c")] {
        router.chat(json!({"user": user})).await;
    }
    let mut owners = Vec::new();
    loop {
        let text = mock.text().await;
        if text.scope == tenant().as_bytes() {
            break;
        }
        owners.push(text.user);
    }
    // Each answer was told once, by the router that had it.
    let subject = Subject::tenant("default");
    let told = |user| {
        let user = subject.user(user);
        let told = owners.iter().filter(|owner| **owner == *user.as_bytes());
        told.count()
    };
    assert!(told("a") <= 1 && told("b") <= 1 && told("c") <= 1);
    // A public text and two answers.
    let received = metric("corpus_received_entries_total", &one);
    two.metric_becomes(&received, 3.0).await;
    let lag = metric("corpus_lag_entries", &one);
    two.metric_becomes(&lag, 0.0).await;
    // The first ones may have gone out before it was known to whom.
    let sent = metric("corpus_sent_entries_total", &two);
    let wait = async { while one.metric(&sent).await.is_none_or(|sent| sent < 2.0) {} };
    let told = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(told.is_ok(), "{sent}");
}

/// A metric about another router.
fn metric(name: &str, other: &Router) -> String {
    format!(
        "shoal_{name}{{router=\"{}\"}}",
        &other.base["http://".len()..]
    )
}

#[tokio::test]
async fn public_text_is_dropped_everywhere_and_survives_its_router() {
    let mock = Mock::start(Script::answer("x")).await;
    let told = Told::of(&[&mock]);
    let [one, two] = pair(&told).await;
    let name = "from one".into();
    let dropped = corpus(&two).await.drop_text(DropTextRequest { name }).await;
    dropped.unwrap();
    lists(&one, &["from two"]).await;
    two.stop().await;
    let again = Router::ready_with(told.args()).await;
    told.set(&[&one, &again]);
    lists(&again, &["from two"]).await;
}

#[tokio::test]
async fn an_erasure_is_heard_of_by_all_before_it_is_answered() {
    let [mut first, mut second] = [
        Mock::start(Script::answer(ANSWER)).await,
        Mock::start(Script::answer(ANSWER)).await,
    ];
    let told = Told::of(&[&first, &second]);
    let [one, two] = pair(&told).await;
    two.chat(json!({"user": "a"})).await;
    let erase = EraseAnswersRequest { user: "a".into() };
    corpus(&one).await.erase_answers(erase).await.unwrap();
    let user = Subject::tenant("default").user("a");
    for mock in [&mut first, &mut second] {
        // From each router, under one name.
        let heard = [mock.erased().await, mock.erased().await];
        assert_ne!(heard[0].origin, heard[1].origin);
        let name = |at: usize| (heard[at].erasure_origin, heard[at].erasure_offset);
        assert_eq!(name(0), name(1));
        assert!(heard.iter().all(|erased| erased.user == user.as_bytes()));
    }
}

#[tokio::test]
async fn an_erasure_that_a_router_has_not_heard_of_is_said_to_be() {
    let mock = Mock::start(Script::answer(ANSWER)).await;
    let told = Told::of(&[&mock]);
    let [one, two] = pair(&told).await;
    // It follows two, and two does not know of it: nobody hears what it erases.
    let deaf = RouterArgs {
        peers: vec![two.base["http://".len()..].into()],
        ..args(&[&mock])
    };
    let deaf = Router::ready_with(deaf).await;
    lists(&deaf, &["from one", "from two"]).await;
    let erase = EraseAnswersRequest { user: "a".into() };
    let refused = corpus(&deaf).await.erase_answers(erase).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    drop(one);
}

#[tokio::test]
async fn where_keys_are_asked_for_a_router_needs_one_of_its_own() {
    let mock = Mock::start(Script::answer("x")).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.toml");
    let hash = |key: &str| -> String {
        Sha256::digest(key)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let keys = format!(
        "[[keys]]\nsha256 = \"{}\"\ntenant = \"default\"\nadmin = true\n\
         [[keys]]\nsha256 = \"{}\"\ntenant = \"routers\"\nrouter = true\n",
        hash("sk-admin"),
        hash("sk-router"),
    );
    std::fs::write(&path, keys).unwrap();
    let guarded = RouterArgs {
        api_keys: Some(path),
        ..args(&[&mock])
    };
    let guarded = Router::ready_with(guarded).await;
    let channel = guarded.channel().await;
    let mut client = CorpusClient::with_interceptor(channel, |mut request: tonic::Request<()>| {
        let metadata = request.metadata_mut();
        metadata.insert("authorization", "Bearer sk-admin".parse().unwrap());
        Ok(request)
    });
    let text = LoadTextRequest {
        name: "faq".into(),
        text: "Parcels come within five days.".into(),
        model: String::new(),
    };
    client.load_text(text).await.unwrap();
    let follower = async |key: Option<&str>| {
        let args = RouterArgs {
            peers: vec![guarded.base["http://".len()..].into()],
            peer_key: key.map(str::to_owned),
            ..args(&[&mock])
        };
        Router::ready_with(args).await
    };
    for (key, reason) in [
        (None, "invalid_api_key"),
        (Some("sk-admin"), "router_key_needed"),
    ] {
        let refused = follower(key).await;
        let rejects = format!("shoal_rejects_total{{reason=\"{reason}\"}}");
        let wait = async { while guarded.metric(&rejects).await.is_none() {} };
        let seen = tokio::time::timeout(Duration::from_secs(30), wait).await;
        assert!(seen.is_ok(), "{reason}");
        lists(&refused, &[]).await;
    }
    lists(&follower(Some("sk-router")).await, &["faq"]).await;
}
