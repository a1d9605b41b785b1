//! From start to end.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use shoal_proto::worker::{DescribeRequest, DrainRequest, Finish, UndrainRequest};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use super::{
    fake::{CONTEXT, Control, FakeBackend, answer},
    rig::{Rig, in_time, submit, tokenizer},
};
use crate::{WorkerConfig, WorkerError, group::Watch, load::Loaded};

#[tokio::test]
async fn it_answers_while_it_loads() {
    let (finish, finished) = mpsc::channel();
    let control = Control::default();
    let backend = FakeBackend::new(control.clone());
    let rig = Rig::loading(
        |_| {},
        control,
        move |_| {
            finished.recv().unwrap();
            Ok(Loaded {
                backend: Box::new(backend),
                tokenizer: tokenizer(),
                group: None,
            })
        },
    )
    .await;
    assert_eq!(rig.get("/live").await.0, 200);
    assert_eq!(rig.get("/ready").await, (503, "starting\n".into()));
    assert_eq!(rig.health().await, ServingStatus::NotServing);
    let mut client = rig.client();
    let description = client.describe(DescribeRequest {});
    let (description, ()) =
        in_time(async { tokio::join!(description, async { finish.send(()).unwrap() }) }).await;
    description.unwrap();
    assert_eq!(rig.get("/ready").await, (200, "ready\n".into()));
    rig.end().await.unwrap();
}

/// Whether a worker is ready again after a drain is up to its group.
#[tokio::test]
async fn a_broken_group_is_not_ready_after_a_drain() {
    let control = Control::default();
    let backend = FakeBackend::new(control.clone());
    let group = Arc::new(Watch::new());
    group.whole.send_replace(true);
    let watch = Arc::clone(&group);
    let load = move |_: &WorkerConfig| {
        Ok(Loaded {
            backend: Box::new(backend),
            tokenizer: tokenizer(),
            group: Some(watch),
        })
    };
    let rig = Rig::loading(|_| {}, control, load).await;
    let mut client = rig.client();
    in_time(async { while rig.get("/ready").await.0 != 200 {} }).await;
    for broken in [true, false] {
        let drain = DrainRequest { deadline_ms: 0 };
        in_time(client.drain(drain)).await.unwrap();
        assert_eq!(rig.get("/ready").await, (503, "draining\n".into()));
        group.whole.send_replace(!broken);
        // The state of a worker that drains does not tell what it has heard of its group.
        in_time(async {
            loop {
                client.undrain(UndrainRequest {}).await.unwrap();
                let expected = if broken { "starting\n" } else { "ready\n" };
                if rig.get("/ready").await.1 == expected {
                    break;
                }
                client.drain(drain).await.unwrap();
            }
        })
        .await;
    }
    rig.end().await.unwrap();
}

#[tokio::test]
async fn the_end_waits_for_running_sequences() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    rig.control.hold();
    session.submit(submit(1, &[1], 100)).await;
    session.ping(1).await;
    let mut client = rig.client();
    rig.shutdown.start();
    in_time(async { while rig.get("/ready").await.0 == 200 {} }).await;
    let status = client.undrain(UndrainRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    rig.control.release();
    let (tokens, last) = session.answer(1).await;
    assert_eq!((tokens, last.finish()), (answer(&[1], 100), Finish::Length));
    while session.frame().await.unwrap().is_some() {}
    rig.end().await.unwrap();
}

#[tokio::test]
async fn the_end_does_not_wait_for_ever() {
    let rig = Rig::with(|config| config.drain = Duration::ZERO).await;
    let mut session = rig.session().await;
    rig.control.hold();
    session.submit(submit(1, &[1], CONTEXT as u32)).await;
    session.ping(1).await;
    rig.shutdown.start();
    in_time(async { while rig.get("/ready").await.0 == 200 {} }).await;
    rig.control.release();
    let mut finish = Finish::Unspecified;
    while finish == Finish::Unspecified {
        finish = session.outputs().await.pop().unwrap().finish();
    }
    assert_eq!(finish, Finish::Preempted);
    rig.end().await.unwrap();
}

#[tokio::test]
async fn a_panic_of_the_loader_ends_the_worker() {
    let rig = Rig::loading(|_| {}, Control::default(), |_| panic!("as asked")).await;
    let mut client = rig.client();
    let description = in_time(client.describe(DescribeRequest {})).await;
    assert!(description.is_err());
    let error = in_time(rig.task).await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::LoadBroken), "{error}");
}

#[tokio::test]
async fn a_model_that_cannot_run_ends_the_worker() {
    let control = Control::default();
    control.panic();
    let backend = FakeBackend::new(control.clone());
    let rig = Rig::loading(
        |_| {},
        control,
        |_| {
            Ok(Loaded {
                backend: Box::new(backend),
                tokenizer: tokenizer(),
                group: None,
            })
        },
    )
    .await;
    let error = in_time(rig.task).await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::FirstRun { .. }), "{error}");
}

#[tokio::test]
async fn an_engine_that_stops_ends_the_worker_and_its_sequences() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    rig.control.hold();
    session.submit(submit(1, &[1], 100)).await;
    session.ping(1).await;
    rig.control.panic();
    rig.control.release();
    let (_, last) = session.answer(1).await;
    assert_eq!(last.finish(), Finish::Preempted);
    let error = in_time(rig.task).await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::EngineStopped(_)), "{error}");
}
