//! Sessions: submissions, outputs, cancellations, and what is left of those that vanish.

use shoal_proto::worker::{
    Cancel, Finish, RejectReason, Scoring, WorkerState, router_frame, worker_frame,
};
use tonic::Code;

use super::{
    fake::{CONTEXT, NUMERICS, VOCAB, answer},
    rig::{Rig, Session, in_time, submit},
};

#[tokio::test]
async fn an_answer_comes_whole() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    let state = session.next(|frame| match frame {
        worker_frame::Frame::State(change) => Some(change.state()),
        _ => None,
    });
    assert_eq!(state.await, WorkerState::Ready);
    session.submit(submit(5, &[1, 2, 3], 20)).await;
    let (tokens, last) = session.answer(5).await;
    assert_eq!(tokens, answer(&[1, 2, 3], 20));
    assert_eq!(last.finish(), Finish::Length);
    assert!(last.usage.is_some());
    rig.end().await.unwrap();
}

#[tokio::test]
async fn steps_carry_the_load_and_rise() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    session.submit(submit(1, &[1], 50)).await;
    let mut before = 0;
    loop {
        let step = session.next(|frame| match frame {
            worker_frame::Frame::Step(step) => Some(step),
            _ => None,
        });
        let step = step.await;
        assert!(step.step > before && step.load.is_some());
        before = step.step;
        if step.sequences[0].finish() == Finish::Length {
            return;
        }
    }
}

#[tokio::test]
async fn prompt_logprobs_are_whole_over_many_frames() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    let prompt: Vec<u32> = (0..3000).map(|i| i % VOCAB as u32).collect();
    let mut scored = submit(1, &prompt, 2);
    scored.scoring = Some(Scoring {
        output_top: Some(20),
        prompt_top: Some(20),
    });
    session.submit(scored).await;
    let (mut prompt_logprobs, mut logprobs) = (0, 0);
    loop {
        for output in session.outputs().await {
            prompt_logprobs += output.prompt_logprobs.len();
            logprobs += output.logprobs.len();
            if output.finish() == Finish::Length {
                assert_eq!((prompt_logprobs, logprobs), (3000, 2));
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_ping_is_answered_with_the_engine_s_steps() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    session.submit(submit(1, &[1], 5)).await;
    session.answer(1).await;
    let pong = session.ping(77).await;
    // Five of the answer, and one of the warm-up at least.
    assert!(pong.step >= 6 && pong.load.is_some(), "{pong:?}");
}

#[tokio::test]
async fn a_cancelled_sequence_ends() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    rig.control.hold();
    session.submit(submit(1, &[1], CONTEXT as u32)).await;
    session.ping(1).await;
    let (sequence, attempt) = (1, 0);
    let cancel = Cancel { sequence, attempt };
    session.send(router_frame::Frame::Cancel(cancel)).await;
    session.ping(2).await;
    rig.control.release();
    loop {
        if let Some(last) = session.outputs().await.pop()
            && last.finish() != Finish::Unspecified
        {
            assert_eq!(last.finish(), Finish::Cancelled);
            break;
        }
    }
    rig.until_metrics(&["shoal_engine_running_sequences 0"])
        .await;
}

#[tokio::test]
async fn every_refusal_has_its_reason() {
    let rig = Rig::with(|config| config.engine.max_waiting = 2).await;
    let mut session = rig.session().await;
    let mut named = submit(1, &[1], 1);
    (named.numerics_id, named.epoch) = (NUMERICS.into(), rig.description().await.epoch);
    session.submit(named).await;
    session.answer(1).await;

    let mut stale = submit(2, &[1], 1);
    stale.epoch = 1;
    let mut numerics = submit(3, &[1], 1);
    numerics.numerics_id = vec![0; 32];
    let mut nan = submit(4, &[1], 1);
    nan.sampling.as_mut().unwrap().temperature = f32::NAN;
    let empty = submit(5, &[], 1);
    let long = submit(6, &[1; CONTEXT + 1], 1);
    let unknown = submit(7, &[VOCAB as u32], 1);
    for (refused, reason, message) in [
        (stale, RejectReason::StaleEpoch, "epoch"),
        (numerics, RejectReason::NumericsMismatch, "numerics"),
        (nan, RejectReason::Invalid, "temperature"),
        (empty, RejectReason::Invalid, "empty"),
        (long, RejectReason::Invalid, "4097 tokens"),
        (unknown, RejectReason::Invalid, "token 64"),
    ] {
        let sequence = refused.sequence;
        session.submit(refused).await;
        let rejected = session.rejected().await;
        assert_eq!((rejected.sequence, rejected.reason()), (sequence, reason));
        assert!(rejected.message.contains(message), "{}", rejected.message);
    }

    // Of those that ended, the last may still be counted.
    rig.control.hold();
    for sequence in 10..14 {
        session.submit(submit(sequence, &[1], 1)).await;
    }
    assert_eq!(session.rejected().await.reason(), RejectReason::Overloaded);
    rig.control.release();
    rig.until_metrics(&[
        "shoal_worker_rejected_sequences_total{reason=\"stale_epoch\"} 1",
        "shoal_worker_rejected_sequences_total{reason=\"invalid\"} 4",
    ])
    .await;
}

#[tokio::test]
async fn the_end_of_the_router_s_stream_cancels_and_ends_the_session() {
    let rig = Rig::start().await;
    let mut session = rig.session().await;
    rig.control.hold();
    session.submit(submit(1, &[1], CONTEXT as u32)).await;
    session.ping(1).await;
    let Session { send, mut frames } = session;
    drop(send);
    while in_time(frames.message()).await.unwrap().is_some() {}
    rig.until_metrics(&["shoal_worker_sessions 0"]).await;
    rig.control.release();
    rig.until_empty().await;
    // The warm-up's, and that of the step that was held.
    assert!(rig.metric("shoal_engine_decode_tokens_total").await <= 2.0);
}

#[tokio::test]
async fn a_thousand_vanishing_sessions_leave_nothing() {
    let rig = Rig::with(|config| config.max_sessions = 1000).await;
    let mut client = rig.client();
    for round in 0..1000u32 {
        let mut session = Session::open(&mut client).await;
        session
            .submit(submit(1, &[1 + round % 9; 40], CONTEXT as u32))
            .await;
        if round.is_multiple_of(3) {
            session.outputs().await;
        }
    }
    rig.until_empty().await;
    let mut session = rig.session().await;
    session.submit(submit(1, &[3], 10)).await;
    assert_eq!(session.answer(1).await.0, answer(&[3], 10));
}

#[tokio::test]
async fn a_reader_that_stalls_does_not_stall_another() {
    let rig = Rig::start().await;
    let (stalled, mut other) = (rig.session().await, rig.session().await);
    for sequence in 0..16 {
        let mut scored = submit(sequence, &[1 + sequence as u32], 1000);
        scored.scoring = Some(Scoring {
            output_top: Some(20),
            prompt_top: None,
        });
        stalled.submit(scored).await;
    }
    other.submit(submit(1, &[1], 2000)).await;
    assert_eq!(other.answer(1).await.0, answer(&[1], 2000));
    let mut stalled = stalled;
    let mut unfinished = 16;
    while unfinished > 0 {
        let outputs = stalled.outputs().await;
        unfinished -= outputs
            .iter()
            .filter(|o| o.finish() == Finish::Length)
            .count();
    }
}

#[tokio::test]
async fn a_session_that_is_never_read_is_closed() {
    let rig = Rig::with(|config| config.session_backlog = 64 << 10).await;
    let mut session = rig.session().await;
    for sequence in 0..16 {
        let mut scored = submit(sequence, &[1 + sequence as u32], 4000);
        scored.scoring = Some(Scoring {
            output_top: Some(20),
            prompt_top: None,
        });
        session.submit(scored).await;
    }
    // The engine gives it up before anybody reads.
    in_time(async {
        while rig.metric("shoal_engine_decode_tokens_total").await < 100.0
            || rig.metric("shoal_engine_running_sequences").await > 0.0
        {}
    })
    .await;
    assert!(rig.metric("shoal_engine_decode_tokens_total").await < 16.0 * 4000.0);
    let status = loop {
        match session.frame().await {
            Ok(frame) => assert!(frame.is_some(), "the stream ends with a status"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted);
    rig.until_empty().await;
}

#[tokio::test]
async fn sessions_have_a_limit() {
    let rig = Rig::with(|config| config.max_sessions = 1).await;
    let mut client = rig.client();
    let first = Session::open(&mut client).await;
    let status = Session::try_open(&mut client).await.err().unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(first);
    rig.until_empty().await;
    Session::open(&mut client).await;
}
