//! A stream survives its worker.

use serde_json::json;
use shoal_proto::worker::{RejectReason, WorkerState};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    mock::{Mock, Script, tokens},
    operate::status,
    support::{Router, args, content, joined},
};

/// The name of a metric of one worker.
fn worker_metric(name: &str, mock: &Mock) -> String {
    format!("shoal_worker_{name}{{worker=\"{}\"}}", mock.address)
}

const TEXT: &str = "the very same text, wherever it is made";

#[tokio::test]
async fn a_crash_mid_stream_is_a_pause() {
    for break_at in [0, 1, 7, TEXT.len()] {
        let script = Script {
            break_at: Some(break_at),
            ..Script::answer(TEXT)
        };
        let mut mock = Mock::start(script).await;
        let router = Router::ready(&[&mock]).await;
        let fields = json!({"seed": 11, "stream_options": {"include_usage": true}});
        let chunks = router.stream(fields).await.rest().await;
        assert_eq!(joined(&chunks, 0), TEXT, "broken at {break_at}");
        let usage = &chunks.last().unwrap()["usage"];
        assert_eq!(usage["completion_tokens"], TEXT.len() + 1);
        let (first, second) = (mock.submitted().await, mock.submitted().await);
        assert_eq!((first.attempt, second.attempt), (0, 1));
        assert_eq!(first.sequence, second.sequence);
        assert_eq!(second.resume, tokens(&TEXT[..break_at]));
        assert_eq!((second.seed, second.prompt), (11, first.prompt));
        assert_eq!(router.metric("shoal_resubmissions_total").await, Some(1.0));
        router.stop().await;
    }
}

#[tokio::test]
async fn another_worker_takes_over() {
    let script = Script {
        break_at: Some(5),
        ..Script::answer(TEXT)
    };
    let a = Mock::start(script.clone()).await;
    let b = Mock::start(script).await;
    let router = Router::ready(&[&a, &b]).await;
    for mock in [&a, &b] {
        router
            .metric_becomes(&worker_metric("ready", mock), 1.0)
            .await;
    }
    let answer = router.chat(json!({})).await;
    assert_eq!(content(&answer), TEXT);
}

#[tokio::test]
async fn a_preempted_sequence_goes_on() {
    let script = Script {
        preempt_at: Some(9),
        ..Script::answer(TEXT)
    };
    let mut mock = Mock::start(script).await;
    let router = Router::ready(&[&mock]).await;
    assert_eq!(content(&router.chat(json!({})).await), TEXT);
    mock.submitted().await;
    assert_eq!(mock.submitted().await.resume.len(), 9);
}

#[tokio::test]
async fn repeated_tokens_are_dropped() {
    let script = Script {
        break_at: Some(4),
        repeat: true,
        ..Script::answer(TEXT)
    };
    let mock = Mock::start(script).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router.chat(json!({"logprobs": true})).await;
    assert_eq!(content(&answer), TEXT);
    let logprobs = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(logprobs.len(), TEXT.len());
}

#[tokio::test]
async fn a_request_that_kills_every_worker_is_given_up() {
    let mut mock = Mock::gated(Script::answer(TEXT)).await;
    let router = Router::ready(&[&mock]).await;
    let killer = async {
        for _ in 0..4 {
            mock.submitted().await;
            mock.crash();
        }
    };
    let ((status, error), ()) = tokio::join!(
        router.error("/v1/completions", json!({"prompt": "x"})),
        killer
    );
    assert_eq!((status, &error["code"]), (503, &json!("worker_lost")));
}

#[tokio::test]
async fn a_lost_stream_without_a_worker_ends_with_an_error_event() {
    let mock = Mock::gated(Script::answer(TEXT)).await;
    let mut args = args(&[&mock]);
    args.resume_window = std::time::Duration::from_millis(200);
    let router = Router::ready_with(args).await;
    let stream = router.stream(json!({}));
    let first = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (mut events, ()) = tokio::join!(stream, first);
    assert_eq!(events.text().await, "t");
    drop(mock);
    let event = events.chunk().await;
    assert_eq!(event["error"]["code"], "no_ready_worker");
    assert_eq!(event["error"]["type"], "server_error");
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_draining_worker_gets_nothing_new_and_finishes_its_own() {
    let mock = Mock::gated(Script::answer("ab")).await;
    let mut args = args(&[&mock]);
    args.resume_window = std::time::Duration::from_millis(200);
    let router = Router::ready_with(args).await;
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (events, ()) = tokio::join!(router.stream(json!({})), begin);
    mock.set_state(WorkerState::Draining);
    router.becomes(ServingStatus::NotServing).await;
    let (status, error) = router
        .error("/v1/completions", json!({"prompt": "x"}))
        .await;
    assert_eq!((status, &error["code"]), (503, &json!("no_ready_worker")));
    mock.step(2);
    assert_eq!(joined(&events.rest().await, 0), "ab");
}

#[tokio::test]
async fn a_refusing_worker_is_passed_over() {
    for reason in [
        RejectReason::Draining,
        RejectReason::Overloaded,
        RejectReason::StaleEpoch,
    ] {
        let mut a = Mock::start(Script::answer("from a worker that can")).await;
        let mut b = Mock::start(Script::answer("from a worker that can")).await;
        // So that the other one is asked first.
        b.set_elsewhere(100);
        let router = Router::ready(&[&a, &b]).await;
        router
            .metric_becomes(&worker_metric("ready", &a), 1.0)
            .await;
        router
            .metric_becomes(&worker_metric("running", &b), 100.0)
            .await;
        a.set_script(|script| script.reject = Some(reason));
        let answer = router.chat(json!({})).await;
        assert_eq!(content(&answer), "from a worker that can");
        a.submitted().await;
        b.submitted().await;
    }
}

#[tokio::test]
async fn a_worker_that_is_another_by_now_is_described_anew() {
    let mut mock = Mock::start(Script::answer(TEXT)).await;
    let router = Router::ready(&[&mock]).await;
    // As if it had started anew between its description and the session.
    let stale = mock.renew();
    mock.set_script(|script| script.reject_epoch = Some(stale));
    assert_eq!(content(&router.chat(json!({})).await), TEXT);
    let (first, second) = (mock.submitted().await, mock.submitted().await);
    assert_eq!((first.epoch, second.epoch), (stale, stale + 1));
}

#[tokio::test]
async fn a_prefix_cache_of_another_start_has_the_worker_described_anew() {
    let script = Script {
        pages: true,
        ..Script::answer(TEXT)
    };
    let mut mock = Mock::start(script).await;
    let router = Router::ready(&[&mock]).await;
    // As if it had started anew between its description and the session.
    let stale = mock.renew();
    status(&router, |s| s.groups[0].epoch == stale + 1).await;
    assert_eq!(content(&router.chat(json!({})).await), TEXT);
    assert_eq!(mock.submitted().await.epoch, stale + 1);
}

#[tokio::test]
async fn an_idle_router_sees_what_other_routers_do() {
    let mut a = Mock::start(Script::answer("x")).await;
    let mut b = Mock::start(Script::answer("x")).await;
    let mut args = args(&[&a, &b]);
    // A quarter of it is the time between pings.
    args.worker_silence = std::time::Duration::from_secs(2);
    let router = Router::ready_with(args).await;
    a.set_elsewhere(100);
    router
        .metric_becomes(&worker_metric("ready", &b), 1.0)
        .await;
    router
        .metric_becomes(&worker_metric("running", &a), 100.0)
        .await;
    for _ in 0..3 {
        router.chat(json!({})).await;
    }
    assert_eq!((a.untaken(), b.untaken()), (0, 3));
}

#[tokio::test]
async fn a_stream_leaves_a_worker_that_hangs() {
    let mut hung = Mock::gated(Script::answer(TEXT)).await;
    let mut other = Mock::start(Script::answer(TEXT)).await;
    // So that the one that hangs is asked first.
    other.set_elsewhere(100);
    let router = Router::ready(&[&hung, &other]).await;
    router
        .metric_becomes(&worker_metric("ready", &hung), 1.0)
        .await;
    router
        .metric_becomes(&worker_metric("running", &other), 100.0)
        .await;
    // It answers pings, but makes no step.
    assert_eq!(content(&router.chat(json!({})).await), TEXT);
    assert_eq!(hung.submitted().await.attempt, 0);
    assert_eq!(other.submitted().await.attempt, 1);
    assert_eq!(hung.cancelled().await.attempt, 0);
    assert_eq!(
        router.metric(&worker_metric("suspected", &hung)).await,
        Some(1.0)
    );
    router.chat(json!({})).await;
    assert_eq!(hung.untaken(), 0);
    // A step is a sign of life.
    hung.advance(1);
    router
        .metric_becomes(&worker_metric("suspected", &hung), 0.0)
        .await;
    hung.step(2 * TEXT.len());
    router.chat(json!({})).await;
    assert_eq!(hung.submitted().await.attempt, 0);
}

#[tokio::test]
async fn a_stream_stays_where_there_is_no_other_worker() {
    let mut mock = Mock::gated(Script::answer(TEXT)).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router.chat(json!({}));
    let hang = async {
        router
            .metric_becomes(&worker_metric("suspected", &mock), 1.0)
            .await;
        mock.step(2 * TEXT.len());
    };
    let (answer, ()) = tokio::join!(answer, hang);
    assert_eq!(content(&answer), TEXT);
    mock.submitted().await;
    assert_eq!(mock.untaken(), 0);
}

#[tokio::test]
async fn a_worker_that_fails_again_and_again_is_left_alone() {
    let script = Script {
        preempt_at: Some(0),
        ..Script::answer(TEXT)
    };
    let mut bad = Mock::start(script.clone()).await;
    let mut good = Mock::start(Script::answer(TEXT)).await;
    good.set_elsewhere(100);
    let router = Router::ready(&[&bad, &good]).await;
    router
        .metric_becomes(&worker_metric("ready", &bad), 1.0)
        .await;
    router
        .metric_becomes(&worker_metric("running", &good), 100.0)
        .await;
    bad.set_script(|script| script.always_preempt = true);
    // Three in a row open the breaker; the fourth attempt goes to the other worker.
    assert_eq!(content(&router.chat(json!({})).await), TEXT);
    assert_eq!(good.submitted().await.attempt, 3);
    assert_eq!(
        router.metric(&worker_metric("breaker_open", &bad)).await,
        Some(1.0)
    );
    assert_eq!(bad.untaken(), 3);
    // One sequence at a time tries it again; its output closes the breaker.
    bad.set_script(|script| *script = Script::answer(TEXT));
    while bad.untaken() == 0 {
        assert_eq!(content(&router.chat(json!({})).await), TEXT);
    }
    router
        .metric_becomes(&worker_metric("breaker_open", &bad), 0.0)
        .await;
}
