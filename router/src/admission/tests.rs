//! Admission under paused time.

use futures::FutureExt;
use proptest::prelude::*;

use super::*;

const WORK: Work = Work {
    prompt: 100.0,
    output: 10.0,
};

fn admission(max_running: u32, max_waiting: u32) -> Arc<Admission> {
    Admission::new(Limits {
        max_running,
        max_waiting,
    })
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

type Admitted = futures::future::BoxFuture<'static, Result<Vec<Permit>, RequestError>>;

/// A request that is in the queue, or through it.
fn request(admission: &Arc<Admission>, sequences: u32, priority: u32) -> Admitted {
    let ticket = admission.enter(Throughput::default(), far()).unwrap();
    let mut admitted = ticket.admit(sequences, WORK, priority, far()).boxed();
    match (&mut admitted).now_or_never() {
        None => admitted,
        Some(result) => futures::future::ready(result).boxed(),
    }
}

/// The permits of a request that is through the queue.
fn through(admitted: &mut Admitted) -> Option<Vec<Permit>> {
    admitted.now_or_never().map(Result::unwrap)
}

#[tokio::test(start_paused = true)]
async fn free_room_is_given_at_once_and_comes_back() {
    let admission = admission(2, 0);
    let permits = through(&mut request(&admission, 2, 0)).unwrap();
    assert_eq!((admission.running(), admission.waiting()), (2, 0));
    assert_eq!(admission.backlog(), WORK.times(2));
    drop(permits);
    assert_eq!(
        (admission.running(), admission.backlog()),
        (0, Work::default())
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_with_the_time_it_takes() {
    let admission = admission(1, 1);
    let _running = through(&mut request(&admission, 1, 0)).unwrap();
    let _waiting = request(&admission, 1, 0);
    let throughput = Throughput {
        prefill: 20.0,
        decode: 5.0,
    };
    let error = admission.enter(throughput, far()).unwrap_err();
    assert!(matches!(error, RequestError::QueueFull { .. }));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(5 + 2)));
}

#[tokio::test(start_paused = true)]
async fn who_would_wait_beyond_the_deadline_is_refused_at_once() {
    let admission = admission(1, 9);
    let _running = through(&mut request(&admission, 1, 0)).unwrap();
    let _waiting = request(&admission, 1, 0);
    let throughput = Throughput {
        prefill: 20.0,
        decode: 5.0,
    };
    let within =
        |seconds| admission.enter(throughput, Instant::now() + Duration::from_secs(seconds));
    assert!(within(8).is_ok());
    let error = within(6).unwrap_err();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(5 + 2)));
}

#[test]
fn a_drain_time_is_a_second_to_a_minute() {
    let time = |prefill, decode| Throughput { prefill, decode }.drain_time(&WORK);
    assert_eq!(time(1e9, 1e9), Duration::from_secs(1));
    assert_eq!(time(1.0, 1.0), Duration::from_secs(60));
    assert_eq!(time(0.0, 0.0), Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn priority_goes_first_then_arrival() {
    let admission = admission(1, 9);
    let mut running = through(&mut request(&admission, 1, 0));
    let mut waiting = [
        request(&admission, 1, 1),
        request(&admission, 1, 2),
        request(&admission, 1, 1),
        request(&admission, 1, 2),
    ];
    for expected in [1, 3, 0, 2] {
        drop(running.take());
        for (i, admitted) in waiting.iter_mut().enumerate() {
            if i == expected {
                running = through(admitted);
                assert!(running.is_some());
                *admitted = futures::future::pending().boxed();
            } else {
                assert!(through(admitted).is_none());
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn small_requests_do_not_pass_a_large_one() {
    let admission = admission(2, 9);
    let running = through(&mut request(&admission, 1, 0)).unwrap();
    let mut large = request(&admission, 2, 0);
    let mut small = request(&admission, 1, 0);
    assert!(through(&mut small).is_none());
    drop(running);
    let permits = through(&mut large).unwrap();
    assert!(through(&mut small).is_none());
    drop(permits);
    assert!(through(&mut small).is_some());
}

#[tokio::test(start_paused = true)]
async fn more_choices_than_the_limit_run_alone() {
    let admission = admission(2, 9);
    let running = through(&mut request(&admission, 1, 0)).unwrap();
    let mut large = request(&admission, 5, 0);
    assert!(through(&mut large).is_none());
    drop(running);
    let permits = through(&mut large).unwrap();
    assert_eq!((permits.len(), admission.running()), (5, 5));
    assert!(through(&mut request(&admission, 1, 0)).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_gives_the_place_back() {
    let admission = admission(1, 1);
    let running = through(&mut request(&admission, 1, 0)).unwrap();
    let ticket = admission.enter(Throughput::default(), far()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(3);
    let error = ticket.admit(1, WORK, 0, deadline).await.unwrap_err();
    assert!(matches!(error, RequestError::Deadline));
    assert_eq!(Instant::now(), deadline);
    assert_eq!((admission.waiting(), admission.backlog()), (0, WORK));
    drop(running);
    assert_eq!(admission.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_when_its_turn_comes_passes_it_on() {
    let admission = admission(1, 9);
    let running = through(&mut request(&admission, 1, 0)).unwrap();
    let first = request(&admission, 1, 0);
    let mut second = request(&admission, 1, 0);
    // The first one has its turn now, but has not seen it.
    drop(running);
    drop(first);
    assert!(through(&mut second).is_some());
    assert_eq!((admission.running(), admission.waiting()), (0, 0));
}

#[test]
fn expectations_follow_what_finished() {
    let admission = admission(1, 1);
    assert_eq!(admission.expected_output(1000), PRIOR_OUTPUT);
    assert_eq!(admission.expected_output(5), 5.0);
    admission.learn(200);
    assert_eq!(admission.expected_output(1000), 200.0);
    admission.learn(100);
    assert_eq!(admission.expected_output(1000), 195.0);
}

proptest! {
    /// Whoever comes and goes in whatever order, nothing is lost and the limit holds.
    #[test]
    fn every_place_comes_back(
        moves in prop::collection::vec((0..3u8, 1..4u32, 0..3u32), 1..60),
    ) {
        let admission = admission(4, 3);
        let (mut queued, mut running) = (Vec::<Admitted>::new(), Vec::<Permit>::new());
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().start_paused(true).build().unwrap();
        let _context = runtime.enter();
        for (what, count, priority) in moves {
            match what {
                0 => {
                    if admission.waiting() < 3 {
                        queued.push(request(&admission, count, priority));
                    }
                }
                1 => running.truncate(running.len().saturating_sub(count as usize)),
                _ => queued.truncate(queued.len().saturating_sub(1)),
            }
            queued.retain_mut(|admitted| match through(admitted) {
                None => true,
                Some(permits) => {
                    running.extend(permits);
                    false
                }
            });
            prop_assert!(admission.running() <= 4);
            prop_assert_eq!(admission.running() as usize, running.len());
            prop_assert_eq!(admission.waiting() as usize, queued.len());
            // Room stands empty only before a request that does not fit into it.
            prop_assert!(queued.is_empty() || admission.running() > 4 - 3);
        }
        drop((queued, running));
        prop_assert_eq!((admission.running(), admission.waiting()), (0, 0));
        prop_assert_eq!(admission.backlog(), Work::default());
    }
}
