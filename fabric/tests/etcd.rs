//! Membership in a real etcd, and what becomes of it when etcd or a process fails.

#![allow(clippy::unwrap_used)]

// Other tests use the rest of it.
#[allow(dead_code)]
mod certificates;
mod server;

use std::{sync::Arc, time::Instant};

use certificates::Certificates;
use server::{PATIENCE, Server};
use shoal_fabric::membership::{Etcd, Intent, Login, Member, Membership, Role, State, View};
use tokio::{sync::watch, time::timeout};

fn worker(name: &str) -> Member {
    let mut member = Member::new(Role::Worker, name.into(), "127.0.0.1:9090".parse().unwrap());
    member.model = "org/model".into();
    member.state = State::Starting;
    member
}

/// Waits for the view to be so.
async fn becomes(view: &mut watch::Receiver<Arc<View>>, what: &str, so: impl Fn(&View) -> bool) {
    let seen = timeout(PATIENCE, view.wait_for(|view| so(view))).await;
    seen.unwrap_or_else(|_| panic!("not so: {what}")).unwrap();
}

fn has(name: &'static str, state: State) -> impl Fn(&View) -> bool {
    move |view| {
        view.workers
            .iter()
            .any(|w| w.name == name && w.state == state)
    }
}

fn lacks(name: &'static str) -> impl Fn(&View) -> bool {
    move |view| !view.workers.iter().any(|w| w.name == name)
}

#[tokio::test]
async fn a_record_follows_its_process() {
    let etcd = Server::start();
    let (ours, theirs) = (etcd.member(), etcd.member());
    let mut view = theirs.watch();
    let (own, record) = watch::channel(worker("a"));
    let registration = ours.register(record);
    becomes(&mut view, "a starts", has("a", State::Starting)).await;
    let member = view.borrow().workers[0].clone();
    assert_eq!((&*member.model, member.role), ("org/model", Role::Worker));

    own.send_modify(|own| own.state = State::Ready);
    becomes(&mut view, "a is ready", has("a", State::Ready)).await;
    own.send_modify(|own| own.state = State::Draining);
    becomes(&mut view, "a drains", has("a", State::Draining)).await;
    // The registration outlives whoever made it.
    drop(ours);
    registration.end().await;
    let left = etcd.must(&["get", "--prefix", "/shoal/v1/test/instances/"]);
    assert_eq!(left, "");
    becomes(&mut view, "a is gone", lacks("a")).await;
}

#[tokio::test]
async fn routers_are_apart_from_workers() {
    let etcd = Server::start();
    let member = etcd.member();
    let router = Member::new(Role::Router, "r".into(), "127.0.0.1:8080".parse().unwrap());
    let (_own, record) = watch::channel(router);
    let registration = member.register(record);
    let mut view = member.watch();
    becomes(&mut view, "r is there", |view| view.routers.len() == 1).await;
    assert!(view.borrow().workers.is_empty());
    registration.end().await;
}

#[tokio::test]
async fn the_record_of_a_dead_process_expires() {
    let etcd = Server::start();
    let (ours, theirs) = (etcd.member(), etcd.member());
    let mut view = theirs.watch();
    let (_own, record) = watch::channel(worker("a"));
    let registration = ours.register(record);
    becomes(&mut view, "a is there", has("a", State::Starting)).await;
    // Its thread ends, and tells nobody.
    drop((ours, registration));
    becomes(&mut view, "a expires", lacks("a")).await;
}

#[tokio::test]
async fn a_lost_lease_is_followed_by_another() {
    let etcd = Server::start();
    let (ours, theirs) = (etcd.member(), etcd.member());
    let mut view = theirs.watch();
    let (_own, record) = watch::channel(worker("a"));
    let registration = ours.register(record);
    becomes(&mut view, "a is there", has("a", State::Starting)).await;
    let leases = etcd.must(&["lease", "list"]);
    let lease = leases.split_whitespace().last().unwrap();
    etcd.must(&["lease", "revoke", lease]);
    becomes(&mut view, "a is lost", lacks("a")).await;
    becomes(&mut view, "a is back", has("a", State::Starting)).await;
    registration.end().await;
}

#[tokio::test]
async fn a_deleted_record_is_made_anew() {
    let etcd = Server::start();
    let (ours, theirs) = (etcd.member(), etcd.member());
    let mut view = theirs.watch();
    let (_own, record) = watch::channel(worker("a"));
    let registration = ours.register(record);
    becomes(&mut view, "a is there", has("a", State::Starting)).await;
    let key = "/shoal/v1/test/instances/org/model/a";
    for _ in 0..3 {
        etcd.must(&["del", key]);
        // It may be back before the view knew that it was gone.
        let end = Instant::now() + PATIENCE;
        while etcd.must(&["get", key]).is_empty() {
            assert!(Instant::now() < end, "the record stays away");
        }
    }
    registration.end().await;
    becomes(&mut view, "a is gone", lacks("a")).await;
}

#[tokio::test]
async fn without_etcd_the_view_stands_and_later_all_is_caught_up() {
    let mut etcd = Server::start();
    let (ours, others, theirs) = (etcd.member(), etcd.member(), etcd.member());
    let mut view = theirs.watch();
    let (own, record) = watch::channel(worker("a"));
    let _a = ours.register(record);
    becomes(&mut view, "a is there", has("a", State::Starting)).await;

    etcd.kill();
    let known = view.borrow_and_update().clone();
    // Long enough for attempts to fail: that of the new one among them.
    let (_, record) = watch::channel(worker("b"));
    let _b = others.register(record);
    assert_eq!(theirs.next_epoch("a", 7).await, 7);
    own.send_modify(|own| own.state = State::Ready);
    assert!(!view.has_changed().unwrap());
    assert_eq!(*view.borrow(), known);

    etcd.run();
    becomes(&mut view, "a is ready", has("a", State::Ready)).await;
    becomes(&mut view, "b is there", has("b", State::Starting)).await;
}

#[tokio::test]
async fn what_happens_between_two_watches_is_not_missed() {
    let mut etcd = Server::start();
    let theirs = etcd.member();
    let mut view = theirs.watch();
    let put = |etcd: &Server, name: &str, state: State| {
        let mut member = worker(name);
        member.state = state;
        let key = format!("/shoal/v1/test/instances/org/model/{name}");
        etcd.must(&["put", &key, &serde_json::to_string(&member).unwrap()]);
    };
    put(&etcd, "a", State::Ready);
    put(&etcd, "b", State::Ready);
    becomes(&mut view, "b is there", has("b", State::Ready)).await;

    etcd.kill();
    etcd.run();
    // The follower may or may not be back; the history that it left off at is gone.
    put(&etcd, "a", State::Draining);
    etcd.must(&["del", "/shoal/v1/test/instances/org/model/b"]);
    let status = etcd.must(&["endpoint", "status", "-w", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    etcd.must(&["compact", &revision]);
    becomes(&mut view, "a drains", has("a", State::Draining)).await;
    becomes(&mut view, "b is gone", lacks("b")).await;
    put(&etcd, "c", State::Ready);
    becomes(&mut view, "c is there", has("c", State::Ready)).await;
}

#[tokio::test]
async fn a_record_that_cannot_be_read_hides_no_other() {
    let etcd = Server::start();
    etcd.must(&["put", "/shoal/v1/test/instances/m/bad", "{"]);
    let ours = etcd.member();
    let (_own, record) = watch::channel(worker("a"));
    let registration = ours.register(record);
    let mut view = ours.watch();
    becomes(&mut view, "a is there", has("a", State::Starting)).await;
    assert_eq!(view.borrow().workers.len(), 1);
    registration.end().await;
}

#[tokio::test]
async fn intents_reach_their_group_alone() {
    let etcd = Server::start();
    let ours = etcd.member();
    let (_a, record) = watch::channel(worker("a"));
    let a = ours.register(record);
    let (_b, record) = watch::channel(worker("b"));
    let b = ours.register(record);
    let mut intent = a.intent();
    let key = "/shoal/v1/test/intent/a";
    etcd.must(&["put", key, r#"{"action":"DRAIN","deadline":5}"#]);
    let drain = Intent::Drain { deadline: Some(5) };
    let seen = timeout(PATIENCE, intent.wait_for(|i| *i == Some(drain))).await;
    drop(seen.unwrap().unwrap());
    assert_eq!(*b.intent().borrow(), None);
    etcd.must(&["del", key]);
    let seen = timeout(PATIENCE, intent.wait_for(Option::is_none)).await;
    drop(seen.unwrap().unwrap());
    a.end().await;
    b.end().await;
}

#[tokio::test]
async fn epochs_rise_whoever_asks() {
    let etcd = Server::start();
    let members: Vec<Arc<Etcd>> = (0..8).map(|_| Arc::new(etcd.member())).collect();
    assert_eq!(members[0].next_epoch("a", 100).await, 100);
    assert_eq!(members[1].next_epoch("b", 5).await, 5);
    let asked = members.iter().map(|member| member.next_epoch("a", 100));
    let mut epochs = futures::future::join_all(asked).await;
    epochs.sort_unstable();
    assert_eq!(epochs, (101..109).collect::<Vec<_>>());
    assert_eq!(members[2].next_epoch("a", 1000).await, 1000);
}

#[tokio::test]
async fn etcd_may_ask_for_a_password_over_tls() {
    let etcd = Server::with(Some(Certificates::new()));
    for command in [
        "user add root:secret",
        "user grant-role root root",
        "auth enable",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        etcd.must(&words);
    }
    let member = |password: &str| {
        let mut config = etcd.config();
        config.login = Some(Login {
            user: "root".into(),
            password: password.into(),
        });
        Etcd::start(config).unwrap()
    };
    let (right, wrong) = (member("secret"), member("guess"));
    assert_eq!(wrong.next_epoch("a", 1).await, 1);
    assert_eq!(right.next_epoch("a", 7).await, 7);
    assert_eq!(wrong.next_epoch("a", 1).await, 1, "not told of 7");
    let (_own, record) = watch::channel(worker("a"));
    let registration = right.register(record);
    let mut view = right.watch();
    becomes(&mut view, "a is there", has("a", State::Starting)).await;
    registration.end().await;
}
