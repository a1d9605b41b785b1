//! Costs of made-up workers.

use super::*;

fn candidate(load: Load) -> Candidate {
    Candidate {
        load,
        ..Candidate::default()
    }
}

fn measured_load() -> Load {
    Load {
        prefill_tps: 1000.0,
        decode_tps: 100.0,
        ..Load::default()
    }
}

const WORK: Work = Work {
    prompt: 100.0,
    output: 10.0,
};

fn cheapest(candidates: &[Candidate]) -> usize {
    choose(Routing::Cost, candidates, &WORK, 0).unwrap()
}

#[test]
fn nobody_is_no_choice() {
    for routing in ["cost", "round-robin", "least-load", "power-of-two"] {
        let routing = routing.parse().unwrap();
        assert_eq!(choose(routing, &[], &WORK, 3), None);
        assert_eq!(
            choose(routing, &[candidate(measured_load())], &WORK, 3),
            Some(0)
        );
    }
    assert!("random".parse::<Routing>().is_err());
}

fn seconds(candidate: &Candidate) -> f64 {
    let pace = Pace::fitted(&candidate.load, None);
    let pace = pace.unwrap_or_else(|| Pace::of_rates(&candidate.load));
    candidate.seconds(&pace, &WORK, 0.0)
}

#[test]
fn cost_is_in_seconds() {
    let idle = candidate(measured_load());
    assert!((seconds(&idle) - 0.2).abs() < 1e-9);
    let busy = candidate(Load {
        waiting_uncached_tokens: 400,
        running: 3,
        kv_usage: 0.5,
        ..measured_load()
    });
    assert!((seconds(&busy) - (0.5 + 0.4 + 0.05)).abs() < 1e-9);
}

#[test]
fn a_step_costs_what_the_worker_says() {
    let row = |running| {
        candidate(Load {
            running,
            step_base_ms: 10.0,
            step_row_ms: 1.0,
            ..measured_load()
        })
    };
    assert!((seconds(&row(0)) - (0.1 + 0.11)).abs() < 1e-9);
    assert!((seconds(&row(5)) - (0.1 + 0.16)).abs() < 1e-9);
    let priced = candidate(Load {
        step_base_ms: 10.0,
        prompt_row_ms: 2.0,
        ..measured_load()
    });
    // Rows that look free cost a share of the base.
    assert!((seconds(&priced) - (0.2 + 0.102)).abs() < 1e-9);
}

#[test]
fn a_worker_that_has_done_nothing_counts_as_an_average_one() {
    let busy = candidate(Load {
        running: 1,
        step_base_ms: 10.0,
        step_row_ms: 1.0,
        ..Load::default()
    });
    assert_eq!(cheapest(&[busy, candidate(Load::default())]), 1);
}

#[test]
fn a_worker_that_has_seen_few_prompts_counts_as_an_average_one() {
    let worker = |prompt_row_ms, prefill_tps| {
        candidate(Load {
            step_base_ms: 10.0,
            prompt_row_ms,
            prefill_tps,
            ..Load::default()
        })
    };
    // Its one prompt was short, and took as long as a step does.
    let mut workers = [worker(0.5, 2000.0), worker(0.0, 100.0)];
    workers[0].placed.sequences = 1;
    assert_eq!(cheapest(&workers), 1);
}

#[test]
fn free_rows_spread_all_the_same() {
    let worker = |base| {
        candidate(Load {
            step_base_ms: base,
            step_row_ms: 1e-6,
            ..Load::default()
        })
    };
    let mut workers = [worker(50.0), worker(50.3), worker(50.1)];
    for _ in 0..60 {
        let chosen = cheapest(&workers);
        workers[chosen].placed.sequences += 1;
    }
    assert!(
        workers
            .iter()
            .all(|w| (19..=21).contains(&w.placed.sequences))
    );
}

#[test]
fn a_new_prompt_goes_where_it_pushes_nothing_out() {
    let full = Candidate {
        fill: 1.0,
        ..candidate(measured_load())
    };
    let half = Candidate { fill: 0.5, ..full };
    assert_eq!(cheapest(&[full, half]), 1);
    let home = Candidate {
        cached: 100.0,
        ..full
    };
    assert_eq!(cheapest(&[half, home]), 1);
}

#[test]
fn the_faster_worker_wins_and_a_queue_turns_it() {
    let slow = candidate(measured_load());
    let mut fast = candidate(Load {
        prefill_tps: 4000.0,
        decode_tps: 400.0,
        ..Load::default()
    });
    assert_eq!(cheapest(&[slow, fast]), 1);
    fast.load.waiting_uncached_tokens = 4000;
    assert_eq!(cheapest(&[slow, fast]), 0);
}

#[test]
fn own_placements_spread_a_burst_between_reports() {
    let mut workers = [candidate(measured_load()); 3];
    for _ in 0..30 {
        let chosen = cheapest(&workers);
        workers[chosen].placed.sequences += 1;
        workers[chosen].placed.unstarted_tokens += 100;
    }
    assert!(workers.iter().all(|w| w.placed.sequences == 10));
}

#[test]
fn the_load_of_other_routers_counts_beside_the_own() {
    let placed = Placed {
        sequences: 4,
        unstarted_tokens: 100,
    };
    let shared = Candidate {
        load: Load {
            running: 5,
            waiting: 1,
            waiting_uncached_tokens: 300,
            ..measured_load()
        },
        reported: placed,
        placed: Placed {
            sequences: 7,
            unstarted_tokens: 400,
        },
        ..Candidate::default()
    };
    assert_eq!((shared.rows(), shared.waiting()), (9.0, 600.0));
    // A report that is older than the placements it should count is no negative load.
    let early = Candidate {
        load: measured_load(),
        reported: placed,
        placed,
        ..Candidate::default()
    };
    assert_eq!((early.rows(), early.waiting()), (4.0, 100.0));
}

#[test]
fn a_cached_prefix_is_a_credit_that_melts_under_load() {
    let other = candidate(measured_load());
    let mut home = Candidate {
        cached: 100.0,
        ..other
    };
    assert_eq!(cheapest(&[other, home]), 1);
    // Saves 0.1 s; an excess of 0.05 s leaves 0.067 of it, one of 0.07 s 0.059.
    home.load.waiting_uncached_tokens = 50;
    assert_eq!(cheapest(&[other, home]), 1);
    home.load.waiting_uncached_tokens = 70;
    assert_eq!(cheapest(&[other, home]), 0);
}

#[test]
fn a_hot_prefix_does_not_pile_up() {
    let mut workers = [candidate(measured_load()); 4];
    workers[2].cached = 96.0;
    for _ in 0..40 {
        let chosen = cheapest(&workers);
        // Whoever computes it has it from then on.
        let uncached = (100.0 - workers[chosen].cached) as u64;
        workers[chosen].cached = 96.0;
        workers[chosen].placed.sequences += 1;
        workers[chosen].placed.unstarted_tokens += uncached;
    }
    let most = workers.iter().map(|w| w.placed.sequences).max();
    assert!(most <= Some(12), "{workers:?}");
}

#[test]
fn simple_routings_do_what_they_say() {
    let mut workers = [candidate(measured_load()); 3];
    workers[0].placed.sequences = 2;
    let taken = |routing, turn| choose(routing, &workers, &WORK, turn);
    let turns: Vec<_> = (0..4).map(|t| taken(Routing::RoundRobin, t)).collect();
    assert_eq!(turns, [Some(0), Some(1), Some(2), Some(0)]);
    let turns: Vec<_> = (0..4).map(|t| taken(Routing::LeastLoad, t)).collect();
    assert_eq!(turns, [Some(1), Some(1), Some(2), Some(1)]);
    assert!((0..100).all(|t| taken(Routing::PowerOfTwo, t) != Some(0)));
}

#[test]
fn nonsense_from_a_worker_is_no_nan() {
    let odd = candidate(Load {
        kv_usage: f64::NAN,
        prefill_tps: f64::NAN,
        decode_tps: -1.0,
        ..Load::default()
    });
    let sane = candidate(measured_load());
    assert_eq!(cheapest(&[odd, sane]), 1);
}
