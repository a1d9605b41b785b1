//! One session, its worker played by the test.

use futures::{FutureExt, StreamExt, stream::BoxStream};
use shoal_proto::worker::{RejectReason, SequenceOutput, SequenceUsage, Stopping};

use super::*;
use crate::{
    admission::{Admission, Limits, Throughput},
    placement::Work,
};

const PING: Duration = Duration::from_secs(5);

fn submit(sequence: u64, attempt: u32) -> Submit {
    Submit {
        sequence,
        attempt,
        prompt: vec![1, 2, 3],
        stopping: Some(Stopping {
            max_tokens: 4,
            ..Stopping::default()
        }),
        ..Submit::default()
    }
}

fn output(attempt: u32, offset: u32, tokens: &[u32]) -> SequenceOutput {
    SequenceOutput {
        sequence: 7,
        attempt,
        output_offset: offset,
        tokens: tokens.to_vec(),
        ..SequenceOutput::default()
    }
}

fn finished(output: SequenceOutput, finish: Finish) -> SequenceOutput {
    SequenceOutput {
        finish: finish as i32,
        usage: Some(SequenceUsage {
            cached_tokens: 2,
            ..SequenceUsage::default()
        }),
        ..output
    }
}

struct Rig {
    session: Arc<Session>,
    frames: BoxStream<'static, RouterFrame>,
}

impl Rig {
    fn new() -> Self {
        let (session, frames) = Session::new(PING);
        let frames = frames.boxed();
        Self { session, frames }
    }

    async fn submit(&self, attempt: u32) -> Attachment {
        self.session
            .submit(submit(7, attempt), 3, None)
            .await
            .unwrap()
    }

    fn deliver(&self, output: SequenceOutput) {
        self.session.deliver(StepOutput {
            sequences: vec![output],
            ..StepOutput::default()
        });
    }

    /// The next frame that is no ping.
    async fn frame(&mut self) -> Frame {
        loop {
            match self.frames.next().await.unwrap().frame.unwrap() {
                Frame::Ping(_) => {}
                frame => return frame,
            }
        }
    }
}

fn cancel(sequence: u64, attempt: u32) -> Frame {
    Frame::Cancel(Cancel { sequence, attempt })
}

fn tokens(event: Event) -> Vec<u32> {
    match event {
        Event::Output(output) => output.tokens,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn outputs_that_nobody_fetched_become_one() {
    let mut rig = Rig::new();
    let attachment = rig.submit(0).await;
    assert_eq!(rig.frame().await, Frame::Submit(submit(7, 0)));
    assert!(attachment.next().now_or_never().is_none());
    rig.deliver(output(0, 0, &[5]));
    assert_eq!(tokens(attachment.next().await), [5]);
    rig.deliver(output(0, 1, &[6]));
    rig.deliver(finished(output(0, 2, &[7, 8]), Finish::Stop));
    let Event::Output(merged) = attachment.next().await else {
        panic!("no output");
    };
    assert_eq!(merged, finished(output(0, 1, &[6, 7, 8]), Finish::Stop));
    assert_eq!(rig.session.placed(), Placed::default());
}

#[tokio::test(start_paused = true)]
async fn prompts_count_until_their_first_output() {
    let rig = Rig::new();
    let attachment = rig.submit(0).await;
    let placed = |sequences, unstarted_tokens| Placed {
        sequences,
        unstarted_tokens,
    };
    assert_eq!(rig.session.placed(), placed(1, 3));
    rig.deliver(output(0, 0, &[5]));
    assert_eq!(rig.session.placed(), placed(1, 0));
    let other = rig.session.submit(submit(8, 0), 3, None).await.unwrap();
    assert_eq!(rig.session.placed(), placed(2, 3));
    drop((attachment, other));
    assert_eq!(rig.session.placed(), placed(0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_old_attempt_is_not_heard() {
    let rig = Rig::new();
    drop(rig.submit(0).await);
    let attachment = rig.submit(1).await;
    rig.deliver(output(0, 0, &[1]));
    rig.session.reject(Rejected {
        sequence: 7,
        attempt: 0,
        ..Rejected::default()
    });
    rig.deliver(output(1, 0, &[2]));
    assert_eq!(tokens(attachment.next().await), [2]);
}

#[tokio::test(start_paused = true)]
async fn more_than_max_tokens_is_the_end() {
    let mut rig = Rig::new();
    let attachment = rig.submit(0).await;
    rig.frame().await;
    rig.deliver(output(0, 0, &[1, 2, 3]));
    rig.deliver(output(0, 3, &[4, 5]));
    assert_eq!(tokens(attachment.next().await), [1, 2, 3]);
    assert!(matches!(attachment.next().await, Event::Lost));
    assert_eq!(rig.frame().await, cancel(7, 0));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_attachment_cancels_and_one_that_ended_does_not() {
    let mut rig = Rig::new();
    let attachment = rig.submit(0).await;
    rig.frame().await;
    drop(attachment);
    assert_eq!(rig.frame().await, cancel(7, 0));
    let ended = rig.submit(1).await;
    rig.frame().await;
    rig.deliver(finished(output(1, 0, &[1]), Finish::Length));
    drop(ended);
    drop(rig.submit(2).await);
    assert_eq!(rig.frame().await, cancel(7, 2));
}

#[tokio::test(start_paused = true)]
async fn a_withdrawn_submission_is_not_sent() {
    let mut rig = Rig::new();
    drop(rig.submit(0).await);
    let _kept = rig.submit(1).await;
    assert_eq!(rig.frame().await, cancel(7, 0));
    assert_eq!(rig.frame().await, Frame::Submit(submit(7, 1)));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_sequence_is_heard_to_its_end() {
    let mut rig = Rig::new();
    let attachment = rig.submit(0).await;
    rig.frame().await;
    attachment.cancel();
    attachment.cancel();
    assert_eq!(rig.frame().await, cancel(7, 0));
    rig.deliver(finished(output(0, 0, &[1]), Finish::Cancelled));
    assert_eq!(tokens(attachment.next().await), [1]);
    drop(attachment);
    // No second cancellation has come before this.
    let _next = rig.submit(1).await;
    assert_eq!(rig.frame().await, Frame::Submit(submit(7, 1)));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_says_why() {
    let rig = Rig::new();
    let attachment = rig.submit(0).await;
    rig.session.reject(Rejected {
        sequence: 7,
        attempt: 0,
        reason: RejectReason::Draining as i32,
        message: "bye".into(),
    });
    let event = attachment.next().await;
    let Event::Rejected(reason, message) = event else {
        panic!("{event:?}");
    };
    assert_eq!((reason, message.as_str()), (RejectReason::Draining, "bye"));
    assert_eq!(rig.session.placed(), Placed::default());
}

#[tokio::test(start_paused = true)]
async fn a_closed_session_loses_what_it_has_and_takes_nothing() {
    let mut rig = Rig::new();
    let attachment = rig.submit(0).await;
    rig.deliver(output(0, 0, &[1]));
    rig.session.close();
    assert_eq!(tokens(attachment.next().await), [1]);
    assert!(matches!(attachment.next().await, Event::Lost));
    assert!(rig.frames.next().await.is_none());
    let (admission, permit) = permit().await;
    let refused = rig.session.submit(submit(8, 0), 3, Some(permit)).await;
    let NotSubmitted::Closed(permit) = refused.unwrap_err() else {
        panic!("it is over");
    };
    assert!(permit.is_some());
    drop(permit);
    assert_eq!(admission.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_no_worker_takes_is_not_sent() {
    let mut rig = Rig::new();
    let mut large = submit(7, 0);
    large.prompt = vec![u32::MAX; MAX_ROUTER_FRAME / 5 + 1];
    let refused = rig.session.submit(large.clone(), 3, None).await;
    assert!(matches!(refused, Err(NotSubmitted::TooLarge)));
    assert!(rig.session.lead(large.clone()).is_none());
    assert_eq!(rig.session.placed(), Placed::default());
    // The largest that goes is a frame that a worker takes.
    let over = large.encoded_len() - (MAX_ROUTER_FRAME - ENVELOPE);
    large.prompt.truncate(large.prompt.len() - over.div_ceil(5));
    let _attachment = rig.session.submit(large, 3, None).await.unwrap();
    let frame = Some(rig.frame().await);
    assert!(RouterFrame { frame }.encoded_len() <= MAX_ROUTER_FRAME);
}

#[tokio::test(start_paused = true)]
async fn what_is_evicted_is_lost_here_and_cancelled_there() {
    let mut rig = Rig::new();
    let attachment = rig.submit(0).await;
    rig.frame().await;
    rig.deliver(output(0, 0, &[1]));
    rig.session.evict();
    assert_eq!(tokens(attachment.next().await), [1]);
    assert!(matches!(attachment.next().await, Event::Lost));
    assert_eq!(rig.frame().await, cancel(7, 0));
    assert_eq!(rig.session.placed(), Placed::default());
    drop(attachment);
    let _again = rig.submit(1).await;
    assert_eq!(rig.frame().await, Frame::Submit(submit(7, 1)));
}

async fn permit() -> (Arc<Admission>, Permit) {
    let admission = Admission::new(Limits {
        max_running: 1,
        max_waiting: 1,
    });
    let far = tokio::time::Instant::now() + Duration::from_secs(60);
    let ticket = admission.enter(Throughput::default(), far).unwrap();
    let permits = ticket.admit(1, Work::default(), 0, far).await.unwrap();
    (admission, permits.into_iter().next().unwrap())
}

#[tokio::test(start_paused = true)]
async fn the_permit_ends_with_the_worker_not_with_the_client() {
    let finish = |finish| move |rig: &Rig| rig.deliver(finished(output(0, 1, &[]), finish));
    let ends: [&dyn Fn(&Rig); 5] = [
        &finish(Finish::Stop),
        &finish(Finish::Preempted),
        &|rig| rig.session.close(),
        &|rig| rig.session.evict(),
        &|rig| {
            rig.session.reject(Rejected {
                sequence: 7,
                ..Rejected::default()
            });
        },
    ];
    for (i, end) in ends.iter().enumerate() {
        let rig = Rig::new();
        let (admission, permit) = permit().await;
        let submitted = rig.session.submit(submit(7, 0), 3, Some(permit)).await;
        let attachment = submitted.unwrap();
        rig.deliver(output(0, 0, &[1]));
        assert_eq!(admission.running(), 1);
        // The client has fetched nothing yet.
        end(&rig);
        assert_eq!(admission.running(), 0, "end {i}");
        assert!(attachment.take_permit().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn pings_come_at_their_interval() {
    let mut rig = Rig::new();
    let start = tokio::time::Instant::now();
    for nonce in 1..4 {
        let frame = rig.frames.next().await.unwrap().frame.unwrap();
        assert_eq!(frame, Frame::Ping(Ping { nonce }));
        assert_eq!(start.elapsed(), PING * (nonce as u32 - 1));
    }
}

#[tokio::test]
async fn the_newest_draft_wins_and_what_is_told_is_joined() {
    let mut rig = Rig::new();
    let lead = Submit {
        lead: Some(4),
        ..submit(7, 0)
    };
    let attachment = rig.session.lead(lead).expect("room");
    // Before it is sent, nobody knows it.
    attachment.follow(0, &[1]);
    assert!(matches!(rig.frame().await, Frame::Submit(_)));
    attachment.follow(1, &[2, 3]);
    for token in [4, 5] {
        attachment.draft(Draft {
            base: 3,
            tokens: vec![token],
            ..Draft::default()
        });
    }
    match rig.frame().await {
        Frame::Draft(draft) => assert_eq!((draft.sequence, &*draft.tokens), (7, &[5][..])),
        other => panic!("{other:?}"),
    }
    match rig.frame().await {
        Frame::Follow(follow) => assert_eq!((follow.base, &*follow.tokens), (0, &[1, 2, 3][..])),
        other => panic!("{other:?}"),
    }
    // It goes back as often as it was wrong, and says more than the answer will have.
    for (offset, tokens) in [(0, [1, 2, 3, 4]), (4, [5, 6, 7, 8]), (2, [9, 9, 9, 9])] {
        rig.deliver(output(0, offset, &tokens));
    }
    match attachment.next().await {
        Event::Output(said) => assert_eq!(said.tokens, [1, 2, 9, 9, 9, 9]),
        other => panic!("{other:?}"),
    }
}
