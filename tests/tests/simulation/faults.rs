//! What goes wrong in a simulation, and when.

use std::{collections::BTreeMap, time::Duration};

use rand::{RngExt, rngs::StdRng, seq::IndexedRandom};
use shoal_fabric::shutdown::Shutdown;
use turmoil::Sim;

use crate::{
    etcd::Etcd,
    network::Turmoil,
    worker::{Failure, Held, MODEL},
};

pub(crate) const ROUTER: &str = "router";
pub(crate) const ETCD: &str = "etcd";
/// Delays of a link on which nothing is wrong.
pub(crate) const LEAST_DELAY: Duration = Duration::from_millis(1);
pub(crate) const MOST_DELAY: Duration = Duration::from_millis(10);

/// The time in which a link that has died unnoticed is made anew.
const RECOVERY: Duration = Duration::from_secs(12);

/// What is wrong for a while.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The worker's process is gone.
    Crash(usize),
    /// The worker's engine makes no step; its network lives.
    Hang(usize),
    /// The worker's process stands still.
    Stop(usize),
    /// Nothing that router and worker send each other arrives.
    Cut(usize),
    /// Nothing that the worker sends to the router arrives.
    Mute(usize),
    /// Nothing that the router sends to the worker arrives.
    Deaf(usize),
    /// The link between router and worker delays what goes over it.
    Slow(usize, Duration),
    /// Its connections are reset, once.
    Reset(usize),
    /// One of its steps fails.
    Step(usize, Failure),
    /// It ends in order, and comes back.
    Leave(usize),
    /// Operators want it drained; what is left is given up after some time, if any.
    Drain(usize, Option<Duration>),
    /// Its lease is lost, once.
    Lease(usize),
    /// Somebody deletes its record, once.
    Forgotten(usize),
    /// There is a record of a worker that is not there.
    Ghost,
    /// etcd is gone.
    EtcdCrash,
    /// The router does not reach etcd.
    EtcdCut,
    /// etcd forgets its history, and its watches may have to start anew.
    Compaction,
}

impl Fault {
    /// The worker that it keeps from its work.
    fn worker(&self) -> Option<usize> {
        match self {
            Self::Crash(w)
            | Self::Hang(w)
            | Self::Stop(w)
            | Self::Cut(w)
            | Self::Mute(w)
            | Self::Deaf(w)
            | Self::Slow(w, _)
            | Self::Reset(w)
            | Self::Step(w, _)
            | Self::Leave(w)
            | Self::Drain(w, _) => Some(*w),
            Self::Lease(_)
            | Self::Forgotten(_)
            | Self::Ghost
            | Self::EtcdCrash
            | Self::EtcdCut
            | Self::Compaction => None,
        }
    }
}

/// A fault's beginning or end.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) fault: Fault,
    pub(crate) begins: bool,
}

/// All changes, by their time.
pub(crate) type Schedule = BTreeMap<Duration, Vec<Change>>;

/// Faults until `end`, at most one at a time of each worker and of etcd. The first worker is
/// spared if it is a `rock`: no fault keeps it from its work.
pub(crate) fn draw(workers: usize, rock: bool, end: Duration, rng: &mut StdRng) -> Schedule {
    let mut schedule = Schedule::new();
    let ms = |rng: &mut StdRng, range| Duration::from_millis(rng.random_range(range));
    let mut add = |at: Duration, until: Duration, fault: Fault| {
        let change = |begins| Change {
            fault: fault.clone(),
            begins,
        };
        schedule.entry(at).or_default().push(change(true));
        schedule
            .entry(until.min(end))
            .or_default()
            .push(change(false));
    };
    for w in usize::from(rock)..workers {
        let mut at = ms(rng, 3000..6000);
        while at < end {
            // Mostly short, sometimes longer than any patience.
            let time = match rng.random_range(0..10) {
                0 => ms(rng, 8000..14_000),
                1..4 => ms(rng, 1000..4000),
                _ => ms(rng, 50..1000),
            };
            let fault = match rng.random_range(0..16) {
                0..3 => Fault::Crash(w),
                3 | 4 => Fault::Hang(w),
                5 => Fault::Stop(w),
                6 => Fault::Cut(w),
                7 => *[Fault::Mute(w), Fault::Deaf(w)]
                    .map(Box::new)
                    .choose(rng)
                    .unwrap()
                    .clone(),
                8 => Fault::Slow(w, ms(rng, 20..600)),
                9 => Fault::Reset(w),
                10 => Fault::Drain(w, rng.random_bool(0.5).then(|| ms(rng, 0..2000))),
                11 => Fault::Drain(w, None),
                12 => Fault::Step(w, Failure::Pages),
                13 => Fault::Step(w, Failure::Device),
                14 => Fault::Step(w, Failure::Model),
                _ => Fault::Leave(w),
            };
            add(at, at + time, fault);
            at += time + ms(rng, 100..5000);
        }
    }
    let mut at = ms(rng, 3000..8000);
    while at < end {
        let time = ms(rng, 100..6000);
        let w = rng.random_range(0..workers);
        let fault = match rng.random_range(0..6) {
            0 => Fault::EtcdCrash,
            1 => Fault::EtcdCut,
            2 => Fault::Compaction,
            3 => Fault::Lease(w),
            4 => Fault::Forgotten(w),
            _ => Fault::Ghost,
        };
        add(at, at + time, fault);
        at += time + ms(rng, 500..5000);
    }
    schedule
}

/// Whether a worker was well from one time to another, so that the router could use it: no fault
/// has kept it from its work, nor had done so shortly before.
pub(crate) fn is_well(schedule: &Schedule, worker: usize, from: Duration, to: Duration) -> bool {
    let mut wrong = false;
    let mut until = Duration::ZERO;
    for (&at, changes) in schedule.range(..=to) {
        for change in changes.iter().filter(|c| c.fault.worker() == Some(worker)) {
            wrong = change.begins;
            until = at + RECOVERY;
        }
    }
    !wrong && (until == Duration::ZERO || until <= from)
}

/// What faults act on.
pub(crate) struct Stage<'a> {
    pub(crate) sim: Sim<'a>,
    pub(crate) network: Turmoil,
    pub(crate) etcd: Etcd,
    pub(crate) workers: Vec<Held>,
}

/// The host of a worker.
pub(crate) fn host(worker: usize) -> String {
    format!("w{worker}")
}

impl Stage<'_> {
    /// Starts workers anew whose processes have ended in failure, as their supervisor does.
    pub(crate) fn supervise(&mut self) {
        for (w, held) in self.workers.iter().enumerate() {
            if std::mem::take(&mut held.lock().unwrap().failed) {
                self.sim.bounce(host(w));
            }
        }
    }

    pub(crate) fn change(&mut self, Change { fault, begins }: &Change) {
        let state = if *begins { "begins" } else { "ends" };
        // Outside of every host it would have no time.
        tracing::info!(at = self.sim.elapsed().as_secs_f64(), ?fault, "{state}");
        let (sim, begins) = (&mut self.sim, *begins);
        match fault {
            Fault::Crash(w) if begins => sim.crash(host(*w)),
            Fault::Crash(w) => sim.bounce(host(*w)),
            Fault::Hang(w) => self.workers[*w].lock().unwrap().hung = begins,
            Fault::Stop(w) => {
                self.workers[*w].lock().unwrap().hung = begins;
                for peer in [ROUTER, ETCD] {
                    match begins {
                        true => sim.hold(host(*w), peer),
                        false => sim.release(host(*w), peer),
                    }
                }
            }
            Fault::Cut(w) if begins => sim.partition(ROUTER, host(*w)),
            Fault::Cut(w) => sim.repair(ROUTER, host(*w)),
            Fault::Mute(w) if begins => sim.partition_oneway(host(*w), ROUTER),
            Fault::Mute(w) => sim.repair_oneway(host(*w), ROUTER),
            Fault::Deaf(w) if begins => sim.partition_oneway(ROUTER, host(*w)),
            Fault::Deaf(w) => sim.repair_oneway(ROUTER, host(*w)),
            Fault::Slow(w, delay) if begins => sim.set_link_latency(ROUTER, host(*w), *delay),
            Fault::Slow(w, _) => {
                sim.set_link_latency(ROUTER, host(*w), LEAST_DELAY);
                sim.set_link_max_message_latency(ROUTER, host(*w), MOST_DELAY);
            }
            Fault::Reset(w) if begins => self.network.reset(&host(*w)),
            Fault::Step(w, failure) if begins => {
                self.workers[*w].lock().unwrap().fails = Some(*failure);
            }
            Fault::Leave(w) if begins => {
                let shutdown = self.workers[*w].lock().unwrap().shutdown.clone();
                shutdown.iter().for_each(Shutdown::start);
            }
            Fault::Step(w, _) => self.workers[*w].lock().unwrap().fails = None,
            Fault::Leave(w) => sim.bounce(host(*w)),
            Fault::Drain(w, patience) => {
                let path = format!("intent/{}", host(*w));
                let deadline = patience.map(|patience| (sim.elapsed() + patience).as_millis());
                match (begins, deadline) {
                    (false, _) => self.etcd.delete(&path),
                    (true, None) => self.etcd.put(&path, r#"{"action":"DRAIN"}"#),
                    (true, Some(deadline)) => {
                        let intent = format!(r#"{{"action":"DRAIN","deadline":{deadline}}}"#);
                        self.etcd.put(&path, &intent);
                    }
                }
            }
            Fault::Lease(w) if begins => self.etcd.revoke(&record(&host(*w))),
            Fault::Forgotten(w) if begins => self.etcd.delete(&record(&host(*w))),
            Fault::Ghost if begins => {
                let member =
                    r#"{"name":"ghost","role":"worker","address":"ghost:9090","state":"READY"}"#;
                self.etcd.put(&record("ghost"), member);
            }
            Fault::Ghost => self.etcd.delete(&record("ghost")),
            Fault::EtcdCrash if begins => sim.crash(ETCD),
            Fault::EtcdCrash => sim.bounce(ETCD),
            Fault::EtcdCut if begins => sim.partition(ROUTER, ETCD),
            Fault::EtcdCut => sim.repair(ROUTER, ETCD),
            Fault::Compaction if begins => {
                self.etcd.compact();
                self.network.reset(ETCD);
            }
            // Once, and over.
            Fault::Reset(_) | Fault::Lease(_) | Fault::Forgotten(_) | Fault::Compaction => {}
        }
    }
}

/// Where a worker's record is.
fn record(name: &str) -> String {
    format!("instances/{MODEL}/{name}")
}
