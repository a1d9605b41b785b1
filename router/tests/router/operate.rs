//! The operators' door, and what the membership says of workers.

use std::sync::Arc;

use serde_json::json;
use shoal_fabric::membership::{Local, Member, Membership, Role};
use shoal_proto::{
    admin::{
        DrainRequest, GetLoadRequest, GetStatusRequest, GetStatusResponse, State, UndrainRequest,
        admin_client::AdminClient,
    },
    worker::WorkerState,
};
use shoal_router::RouterArgs;
use tonic::{Code, Request, transport::Channel};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    mock::{Mock, Script},
    support::{Router, args, chat_body, content, error_of, joined},
};

fn member(name: &str, mock: &Mock) -> Member {
    let address = mock.address.to_string().parse().unwrap();
    Member::new(Role::Worker, name.into(), address)
}

/// A router under a membership that the test changes.
async fn local(members: Vec<Member>) -> (Router, Local) {
    let local = Local::default();
    local.set(members);
    let membership: Arc<dyn Membership> = Arc::new(local.clone());
    let args = RouterArgs {
        membership: Some(membership),
        ..args(&[])
    };
    (Router::ready_with(args).await, local)
}

async fn admin(router: &Router) -> AdminClient<Channel> {
    AdminClient::new(router.channel().await)
}

/// Waits for the status to be so.
pub(crate) async fn status(
    router: &Router,
    so: impl Fn(&GetStatusResponse) -> bool,
) -> GetStatusResponse {
    let mut admin = admin(router).await;
    let wait = async {
        loop {
            let status = admin.get_status(GetStatusRequest {}).await.unwrap();
            if so(status.get_ref()) {
                return status.into_inner();
            }
            tokio::task::yield_now().await;
        }
    };
    let so = tokio::time::timeout(std::time::Duration::from_secs(30), wait).await;
    so.expect("the status never was so")
}

fn state(status: &GetStatusResponse, name: &str) -> Option<State> {
    let group = status.groups.iter().find(|group| group.name == name)?;
    group.connected.then(|| group.state())
}

#[tokio::test]
async fn the_status_shows_every_group() {
    let mock = Mock::gated(Script::answer("x")).await;
    let gone = Mock::start(Script::answer("x")).await;
    let lost = member("lost", &gone);
    drop(gone);
    let (router, _) = local(vec![member("a", &mock), lost]).await;
    let asked = router.post("/v1/chat/completions", chat_body(json!({})));
    let seen = async {
        mock.live(1).await;
        let seen = status(&router, |status| status.running == 1).await;
        mock.step(10);
        seen
    };
    let (response, seen) = tokio::join!(asked, seen);
    assert_eq!(response.status(), 200);
    // Those of no known model come first.
    let [lost, a] = seen.groups.as_slice() else {
        panic!("{seen:?}");
    };
    assert_eq!((&*a.name, &*a.model, a.placed), ("a", "mock", 1));
    assert_eq!((a.state(), a.connected, a.epoch), (State::Ready, true, 1));
    assert_eq!((&*lost.name, lost.connected), ("lost", false));
    assert_eq!(lost.load, None);
    let own = seen.router.unwrap();
    assert_eq!(format!("http://{}", own.address), router.base);
    let mut admin = admin(&router).await;
    let load = admin
        .get_load(GetLoadRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(load.models.len(), 1);
    assert_eq!((load.models[0].ready, load.models[0].groups), (1, 1));
}

#[tokio::test]
async fn a_drain_waits_for_what_runs_and_is_undone() {
    let mock = Mock::gated(Script::answer("abc")).await;
    let (router, _) = local(vec![member("a", &mock)]).await;
    let asked = router.stream(json!({}));
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (events, ()) = tokio::join!(asked, begin);

    let mut admin = admin(&router).await;
    let drain = |wait| DrainRequest {
        group: "a".into(),
        deadline_ms: 0,
        wait,
    };
    let left = admin.drain(drain(false)).await.unwrap().into_inner();
    assert_eq!((left.running, left.waiting), (1, 0));
    router.becomes(ServingStatus::NotServing).await;
    status(&router, |s| state(s, "a") == Some(State::Draining)).await;
    let waits = tokio::spawn({
        let mut admin = admin.clone();
        let request = drain(true);
        async move { admin.drain(request).await.unwrap().into_inner() }
    });
    mock.step(10);
    assert_eq!(joined(&events.rest().await, 0), "abc");
    assert_eq!(waits.await.unwrap().running, 0);

    let undrain = UndrainRequest { group: "a".into() };
    admin.undrain(undrain).await.unwrap();
    router.becomes(ServingStatus::Serving).await;
    router.stop().await;
}

#[tokio::test]
async fn an_undrain_ends_a_drain_that_waits() {
    let mock = Mock::gated(Script::answer("abc")).await;
    let (router, _) = local(vec![member("a", &mock)]).await;
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (events, ()) = tokio::join!(router.stream(json!({})), begin);
    let mut admin = admin(&router).await;
    let waits = tokio::spawn({
        let mut admin = admin.clone();
        let request = DrainRequest {
            group: "a".into(),
            deadline_ms: 0,
            wait: true,
        };
        async move { admin.drain(request).await }
    });
    status(&router, |s| state(s, "a") == Some(State::Draining)).await;
    let undrain = UndrainRequest { group: "a".into() };
    admin.undrain(undrain).await.unwrap();
    let waits = tokio::time::timeout(std::time::Duration::from_secs(30), waits);
    let undrained = waits.await.expect("it waits on").unwrap();
    assert_eq!(undrained.unwrap_err().code(), Code::Aborted);
    router.becomes(ServingStatus::Serving).await;
    mock.step(10);
    assert_eq!(joined(&events.rest().await, 0), "abc");
}

#[tokio::test]
async fn groups_that_are_not_there_are_told_apart() {
    let mock = Mock::start(Script::answer("x")).await;
    let gone = Mock::start(Script::answer("x")).await;
    let lost = member("lost", &gone);
    drop(gone);
    let (router, _) = local(vec![member("a", &mock), lost]).await;
    let mut admin = admin(&router).await;
    for (group, code) in [("nobody", Code::NotFound), ("lost", Code::Unavailable)] {
        let request = UndrainRequest {
            group: group.into(),
        };
        assert_eq!(admin.undrain(request).await.unwrap_err().code(), code);
    }
}

#[tokio::test]
async fn operators_need_a_key_where_keys_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys.toml");
    // SHA-256 of "secret" and of "user".
    let text = r#"
        [[keys]]
        sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
        tenant = "ops"
        admin = true

        [[keys]]
        sha256 = "04f8996da763b7a969b1028ee3007569eaf3a635486ddab211d512c85b9df8fb"
        tenant = "acme"
    "#;
    std::fs::write(&keys, text).unwrap();
    let mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready_with(RouterArgs {
        api_keys: Some(keys),
        ..args(&[&mock])
    })
    .await;
    let mut admin = admin(&router).await;
    for (key, code) in [
        (None, Some(Code::Unauthenticated)),
        (Some("user"), Some(Code::PermissionDenied)),
        (Some("secret"), None),
    ] {
        let mut request = Request::new(GetStatusRequest {});
        if let Some(key) = key {
            let value = format!("Bearer {key}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let answer = admin.get_status(request).await;
        assert_eq!(answer.err().map(|status| status.code()), code, "{key:?}");
    }
}

#[tokio::test]
async fn a_worker_that_is_no_member_any_more_finishes_and_gets_nothing_new() {
    let a = Mock::gated(Script::answer("from a")).await;
    let b = Mock::start(Script::answer("from b")).await;
    let (router, membership) = local(vec![member("a", &a)]).await;
    let asked = router.stream(json!({}));
    let begin = async {
        a.live(1).await;
        a.step(1);
    };
    let (events, ()) = tokio::join!(asked, begin);

    membership.set(vec![member("b", &b)]);
    status(&router, |s| state(s, "b") == Some(State::Ready)).await;
    for _ in 0..8 {
        assert_eq!(content(&router.chat(json!({})).await), "from b");
    }
    a.step(10);
    assert_eq!(joined(&events.rest().await, 0), "from a");

    // Its link alone says that it is gone.
    drop(a);
    status(&router, |s| s.groups.len() == 1).await;
    router.stop().await;
}

#[tokio::test]
async fn a_membership_that_lost_everybody_is_no_outage() {
    let mock = Mock::start(Script::answer("still here")).await;
    let (router, membership) = local(vec![member("a", &mock)]).await;
    membership.set(Vec::new());
    let retired = |status: &GetStatusResponse| status.groups.iter().all(|g| g.retired);
    status(&router, retired).await;
    assert_eq!(content(&router.chat(json!({})).await), "still here");
    membership.set(vec![member("a", &mock)]);
    status(&router, |status| !retired(status)).await;
    assert_eq!(content(&router.chat(json!({})).await), "still here");
}

#[tokio::test]
async fn several_models_are_served_by_name() {
    let named = |name: &str| Script {
        model: name.into(),
        ..Script::answer(name)
    };
    let small = Mock::start(named("small")).await;
    let large = Mock::start(named("org/large")).await;
    let router = Router::start(args(&[&small, &large])).await;
    status(&router, |status| {
        status
            .groups
            .iter()
            .all(|group| group.state() == State::Ready)
    })
    .await;
    let (_, list) = router.get("/v1/models").await;
    let ids: Vec<&str> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["org/large", "small"]);
    for model in ids {
        assert_eq!(router.get(&format!("/v1/models/{model}")).await.0, 200);
        let answer = router.chat(json!({ "model": model })).await;
        assert_eq!((content(&answer), &answer["model"]), (model, &json!(model)));
    }
    let unnamed = router.error("/v1/chat/completions", chat_body(json!({})));
    assert_eq!(unnamed.await.1["param"], "model");
    let body = chat_body(json!({ "model": "other" }));
    let (code, error) = error_of(router.post("/v1/chat/completions", body).await).await;
    assert_eq!((code, &error["code"]), (404, &json!("model_not_found")));

    // One that drains takes its model away, not the other's.
    small.set_state(WorkerState::Draining);
    status(&router, |status| {
        status
            .groups
            .iter()
            .any(|group| group.state() == State::Draining)
    })
    .await;
    let answer = router.chat(json!({ "model": "org/large" })).await;
    assert_eq!(content(&answer), "org/large");
}

#[tokio::test]
async fn a_model_that_another_took_the_place_of_does_not_make_it_several() {
    let named = |name: &str| Script {
        model: name.into(),
        ..Script::answer(name)
    };
    let old = Mock::start(named("old")).await;
    let new = Mock::start(named("new")).await;
    let (router, membership) = local(vec![member("a", &old)]).await;
    assert_eq!(content(&router.chat(json!({})).await), "old");
    membership.set(vec![member("b", &new)]);
    drop(old);
    status(&router, |s| {
        s.groups.len() == 1 && state(s, "b") == Some(State::Ready)
    })
    .await;
    assert_eq!(content(&router.chat(json!({})).await), "new");
}

#[tokio::test]
async fn what_waits_moves_to_a_worker_that_is_ready_again() {
    let mut busy = Mock::gated(Script::answer("ab")).await;
    let mut idle = Mock::gated(Script::answer("ab")).await;
    idle.set_state(WorkerState::Draining);
    let router = Router::ready(&[&busy, &idle]).await;
    status(&router, |s| s.groups.iter().all(|group| group.connected)).await;
    let begin = async {
        let begun = busy.submitted().await;
        busy.step(1);
        begun.sequence
    };
    let (mut events, begun) = tokio::join!(router.stream(json!({})), begin);
    assert_eq!(events.text().await, "a");
    let late = async {
        busy.live(4).await;
        idle.set_state(WorkerState::Ready);
        let moved = idle.submitted().await;
        assert_ne!(moved.sequence, begun);
        assert_eq!(busy.cancelled().await.sequence, moved.sequence);
        busy.step(20);
        idle.step(20);
    };
    let ask = || router.chat(json!({}));
    let (a, b, c, ()) = tokio::join!(ask(), ask(), ask(), late);
    for answer in [a, b, c] {
        assert_eq!(content(&answer), "ab");
    }
    assert_eq!(joined(&events.rest().await, 0), "b");
}
