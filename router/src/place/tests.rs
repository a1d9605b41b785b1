//! Placements in a cluster whose workers the tests play.

use std::time::Duration;

use shoal_proto::{
    inference::GenerateRequest,
    worker::{Load, WorkerState},
};
use tokio::time::advance;

use super::*;
use crate::{
    request::Job,
    testing::{self, Played, model_with},
};

async fn job() -> Arc<Job> {
    testing::job(GenerateRequest::default()).await
}

/// What a job of a hundred tokens asks for, of which ten are the prompt.
fn wanted<'a>(job: &'a Job, model: &'a Model) -> Wanted<'a> {
    Wanted {
        model,
        prompt: &[7; 10],
        resumed: 0,
        output: 10.0,
        max_tokens: 90,
        namespace: &job.namespace,
        session_id: "",
        numerics_id: &[],
        avoid: &[],
        at: None,
    }
}

fn chosen(cluster: &Cluster, wanted: &Wanted<'_>) -> Option<Arc<str>> {
    cluster.place(wanted).map(|place| place.address)
}

#[tokio::test]
async fn tokens_go_where_they_mean_the_same() {
    let (cluster, job) = (testing::cluster(), job().await);
    let old = model_with(|_| {});
    let new = model_with(|d| d.tokenizer_sha256 = vec![1; 32]);
    let first = Played::join(&cluster, old.clone());
    let second = Played::join(&cluster, new.clone());
    for (model, played) in [(&old, &first), (&new, &second)] {
        for _ in 0..4 {
            let address = chosen(&cluster, &wanted(&job, model));
            assert_eq!(address.as_ref(), Some(&played.worker.address));
        }
    }
    assert!(!cluster.has_other(&first.connected));
    first.connected.set_state(WorkerState::Draining);
    assert_eq!(chosen(&cluster, &wanted(&job, &old)), None);
}

#[tokio::test]
async fn a_name_stands_for_what_most_ready_workers_serve() {
    let cluster = testing::cluster();
    let old = model_with(|_| {});
    let new = model_with(|d| d.tokenizer_sha256 = vec![1; 32]);
    let _kept = [old.clone(), old.clone()].map(|model| Played::join(&cluster, model));
    let serves = |model: &Model| cluster.model("tiny").unwrap().shares_tokens(model);
    let second = Played::join(&cluster, new.clone());
    assert!(serves(&old), "one of three");
    let third = Played::join(&cluster, new.clone());
    assert!(serves(&new), "as many, and newer");
    for leaving in [&second, &third] {
        leaving.connected.set_state(WorkerState::Draining);
    }
    assert!(serves(&old), "the newer ones are leaving");
    for worker in cluster.workers().iter() {
        cluster.disconnect(worker);
    }
    assert!(serves(&new), "nobody is ready");
}

#[tokio::test]
async fn a_context_that_holds_the_answer_comes_first() {
    let (cluster, job) = (testing::cluster(), job().await);
    let of_context = |tokens| model_with(|d| d.context_length = tokens);
    let long = Played::join(&cluster, of_context(100));
    let short = Played::join(&cluster, of_context(50));
    assert_eq!(cluster.model("tiny").unwrap().context(), 100);
    let model = of_context(100);
    let wanted = wanted(&job, &model);
    let small = Wanted {
        max_tokens: 40,
        ..wanted
    };
    for _ in 0..4 {
        assert_eq!(chosen(&cluster, &wanted), Some(long.worker.address.clone()));
        // A refusal is no reason to cut the answer short.
        let avoid = [long.worker.address.clone()];
        let refused = Wanted {
            avoid: &avoid,
            ..wanted
        };
        assert_eq!(chosen(&cluster, &refused), None);
        let elsewhere = Wanted {
            avoid: &avoid,
            ..small
        };
        assert_eq!(
            chosen(&cluster, &elsewhere),
            Some(short.worker.address.clone())
        );
    }
    // With the long one gone, the short one serves for as long as there is room.
    cluster.disconnect(&long.worker);
    for (resumed, fits) in [(0, true), (39, true), (40, false)] {
        let resumed = Wanted { resumed, ..wanted };
        assert_eq!(chosen(&cluster, &resumed).is_some(), fits);
    }
}

#[tokio::test]
async fn what_a_sequence_has_yet_to_prefill_does_not_hold_it_back() {
    let (cluster, job) = (testing::cluster(), job().await);
    let model = model_with(|d| d.context_length = 8192);
    let wanted = Wanted {
        prompt: &[7; 3200],
        ..wanted(&job, &model)
    };
    let busy = Played::join(&cluster, model.clone());
    let place = cluster.place(&wanted).expect("a worker");
    assert_eq!((place.cached, place.uncached), (0, 3200));
    // Half as much of others waits before it.
    busy.connected.set_load(Load {
        waiting_uncached_tokens: 1500,
        ..Load::default()
    });
    let idle = Played::join(&cluster, model.clone());
    let waits = Wanted {
        at: Some(At {
            connected: &busy.connected,
            unstarted: place.uncached,
            probes: place.pass.probes(),
        }),
        ..wanted
    };
    assert_eq!(chosen(&cluster, &waits), Some(idle.worker.address.clone()));
    // Another one with the same prompt follows it to where it waits.
    assert_eq!(chosen(&cluster, &wanted), Some(busy.worker.address.clone()));
}

#[tokio::test(start_paused = true)]
async fn a_probe_stays_where_it_is_predicted_to_end_first() {
    let (cluster, job) = (testing::cluster(), job().await);
    let model = model_with(|_| {});
    let wanted = wanted(&job, &model);
    let well = Played::join(&cluster, model.clone());
    (0..3).for_each(|_| well.worker.breaker.fail());
    advance(Duration::from_secs(1)).await;
    let probe = cluster.place(&wanted).expect("a probe");
    let other = Played::join(&cluster, model.clone());
    let waiting = |waiting_uncached_tokens| Load {
        waiting_uncached_tokens,
        ..Load::default()
    };
    let at = At {
        connected: &well.connected,
        unstarted: probe.uncached,
        probes: probe.pass.probes(),
    };
    let again = |at| Wanted {
        at: Some(at),
        ..wanted
    };
    let elsewhere = Some(other.worker.address.clone());
    other.connected.set_load(waiting(5000));
    assert_eq!(chosen(&cluster, &again(at)), None, "no better place");
    let behind = At {
        probes: false,
        ..at
    };
    assert_eq!(chosen(&cluster, &again(behind)), elsewhere);
    well.connected.set_load(waiting(50_000));
    assert_eq!(chosen(&cluster, &again(at)), elsewhere);
}

#[tokio::test]
async fn a_dial_that_fails_again_is_no_news() {
    let cluster = testing::cluster();
    let played = Played::join(&cluster, model_with(|_| {}));
    for news in [true, false] {
        let changes = cluster.watch();
        assert_eq!(cluster.disconnect(&played.worker), news);
        assert_eq!(changes.has_changed().unwrap(), news);
    }
}
