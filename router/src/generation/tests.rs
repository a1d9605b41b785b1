//! Generations whose workers the tests play.

use std::future::pending;

use shoal_proto::{inference::GenerateRequest, worker::Load};

use tokio::time::advance;

use super::*;
use crate::{
    admission::{Admission, Limits, Throughput},
    cluster::Cluster,
    testing::{self, Played, model_with},
};

const WINDOW: Duration = Duration::from_secs(30);

struct Rig {
    cluster: Arc<Cluster>,
    dispatch: Arc<Dispatch>,
}

impl Rig {
    fn new() -> Self {
        let cluster = testing::cluster();
        let admission = Admission::new(Limits {
            max_running: 1,
            max_waiting: 1,
        });
        let metrics = cluster.metrics.clone();
        let dispatch = Dispatch::new(cluster.clone(), admission, metrics, WINDOW);
        Self {
            cluster,
            dispatch: Arc::new(dispatch),
        }
    }

    fn join(&self) -> Played {
        Played::join(&self.cluster, model_with(|_| {}))
    }

    /// The only one that there is room for.
    async fn generation(&self) -> Generation {
        let job = testing::job(GenerateRequest::default()).await;
        let (work, deadline) = (Work::default(), job.arrival.deadline);
        let admission = &self.dispatch.admission;
        let ticket = admission.enter(Throughput::default(), deadline).unwrap();
        let mut permits = ticket.admit(1, work, 0, deadline).await.unwrap();
        let permit = permits.remove(0);
        Generation::new(self.dispatch.clone(), job, 0, work, permit)
    }
}

#[tokio::test(start_paused = true)]
async fn a_moved_sequence_that_nobody_takes_is_sent_back() {
    let rig = Rig::new();
    let mut first = rig.join();
    let mut generation = rig.generation().await;
    let workers = async {
        let submit = first.submitted().await;
        first.connected.set_load(Load {
            waiting_uncached_tokens: 100_000,
            ..Load::default()
        });
        let mut second = rig.join();
        let moved = second.submitted().await;
        assert_eq!((moved.sequence, moved.attempt), (submit.sequence, 1));
        second.reject(&moved, RejectReason::Overloaded);
        let back = first.submitted().await;
        first.reject(&back, RejectReason::Overloaded);
        pending::<()>().await;
    };
    let end = tokio::select! {
        news = generation.next() => news.unwrap_err(),
        () = workers => unreachable!(),
    };
    assert!(matches!(end, RequestError::Overloaded { .. }), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_worker_begins_with_the_loss() {
    let rig = Rig::new();
    let mut first = rig.join();
    let mut generation = rig.generation().await;
    let workers = async {
        first.submitted().await;
        // A long prefill, or a queue.
        advance(WINDOW + Duration::from_secs(5)).await;
        rig.cluster.disconnect(&first.worker);
        advance(WINDOW / 2).await;
        let mut second = rig.join();
        let submit = second.submitted().await;
        second.make(&submit, &[5]);
        pending::<()>().await;
    };
    let news = tokio::select! {
        news = generation.next() => news.unwrap(),
        () = workers => unreachable!(),
    };
    assert_eq!(news.tokens, [5]);
}

#[tokio::test(start_paused = true)]
async fn a_lost_sequence_keeps_nobody_out_until_it_goes_on() {
    let rig = Rig::new();
    let admission = &rig.dispatch.admission;
    let mut first = rig.join();
    let mut generation = rig.generation().await;
    tokio::select! {
        news = generation.next() => panic!("{news:?}"),
        _ = first.submitted() => {}
    }
    // From here on nobody reads it.
    rig.cluster.disconnect(&first.worker);
    assert_eq!(admission.running(), 0);
    let other = rig.generation().await;
    assert_eq!(admission.running(), 1);
    let mut second = rig.join();
    let resumed = async {
        let submit = second.submitted().await;
        assert_eq!((submit.attempt, admission.running()), (1, 2));
        second.make(&submit, &[5]);
        pending::<()>().await;
    };
    tokio::select! {
        news = generation.next() => assert_eq!(news.unwrap().tokens, [5]),
        () = resumed => unreachable!(),
    }
    drop((generation, other));
    assert_eq!(admission.running(), 0);
}
