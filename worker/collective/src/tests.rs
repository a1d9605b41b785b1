//! What holds for every group, in shared memory or over TCP.

use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::shm::Ring;
use crate::tcp::{Mesh, Payload, Terms};
use crate::{Collective, CollectiveError, Pace};

/// Longer than a busy machine holds a thread up.
const PATIENCE: Duration = Duration::from_secs(20);
const WORDS: usize = 3000;

/// How ranks are connected.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Memory,
    Tcp(Payload),
}

const KINDS: [Kind; 4] = [
    Kind::Memory,
    Kind::Tcp(Payload::F32),
    Kind::Tcp(Payload::Bf16),
    Kind::Tcp(Payload::Int8),
];

type Group = Box<dyn Collective>;
type Seat = Box<dyn FnOnce() -> Group + Send>;

impl Kind {
    fn seats(self, world: usize, words: usize, patience: Duration) -> Vec<Seat> {
        match self {
            Self::Memory => {
                let seats = Ring::threads(world, words, patience).unwrap();
                let boxed = seats.map(|join| -> Seat { Box::new(|| Box::new(join().unwrap())) });
                boxed.collect()
            }
            Self::Tcp(payload) => {
                let terms = Terms {
                    epoch: 1,
                    payload,
                    words,
                    patience,
                };
                let seats = Mesh::threads(world, terms).unwrap();
                let boxed = seats.map(|mesh| -> Seat { Box::new(|| Box::new(mesh)) });
                boxed.collect()
            }
        }
    }

    /// The two seats of a group of two.
    fn pair(self, patience: Duration) -> [Group; 2] {
        let mut seats = self.seats(2, 1024, patience);
        let (second, first) = (seats.pop().unwrap(), seats.pop().unwrap());
        let second = thread::spawn(second);
        [first(), second.join().unwrap()]
    }

    /// What an exchange makes of a part.
    fn exchanged(self, mut part: Vec<f32>) -> Vec<f32> {
        if let Self::Tcp(payload) = self {
            payload.encode(&mut part, &mut Vec::new());
        }
        part
    }
}

/// A value that tells rank, round and place.
fn value(rank: usize, round: usize, at: usize) -> f32 {
    (rank * 1_000_003 + round * 7919 + at) as f32
}

fn values(rank: usize, round: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| value(rank, round, at)).collect()
}

/// Work of a length that differs from rank to rank and round to round, so that every rank is
/// the last at times.
fn dawdle(rank: usize, round: usize) {
    let spins = (rank * 31 + round * 17) % 23 * 40;
    (0..spins).for_each(|_| std::hint::spin_loop());
}

/// One call of a schedule that all ranks know.
#[derive(Clone, Copy, Debug)]
enum Call {
    Broadcast,
    Gather,
    Exchange,
}

/// Calls in an order that all ranks know; every frame is checked.
fn play(kind: Kind, group: &mut dyn Collective, calls: impl Iterator<Item = (Call, usize)>) {
    let (rank, world) = (group.rank(), group.world());
    let mut plan = Vec::new();
    for (round, (call, len)) in calls.enumerate() {
        dawdle(rank, round);
        match call {
            Call::Broadcast => {
                if rank == 0 {
                    plan.clear();
                    plan.extend((0..len).map(|at| (round + at) as u32));
                }
                group.broadcast(&mut plan).unwrap();
                assert_eq!(plan.len(), len);
                assert!((0..len).all(|at| plan[at] == (round + at) as u32));
            }
            Call::Gather => {
                let own = group.part(len + rank).unwrap();
                own.copy_from_slice(&values(rank, round, len + rank));
                let parts = group.gather().unwrap();
                assert_eq!(parts.is_some(), rank == 0);
                for (rank, part) in parts.iter().flat_map(|parts| parts.iter().enumerate()) {
                    assert!(*part == values(rank, round, len + rank));
                }
            }
            Call::Exchange => {
                let own = group.part(len).unwrap();
                own.copy_from_slice(&values(rank, round, len));
                let parts = group.exchange().unwrap();
                assert_eq!(parts.len(), world);
                for (rank, part) in parts.iter().enumerate() {
                    assert!(*part == kind.exchanged(values(rank, round, len)));
                }
            }
        }
    }
}

/// What each rank's share of `work` gives. None leaves before all are done.
fn together<T: Send + 'static>(
    seats: Vec<Seat>,
    work: impl Fn(&mut dyn Collective) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let threads = seats.into_iter().map(|join| {
        let work = work.clone();
        thread::spawn(move || {
            let mut group = join();
            (work(group.as_mut()), group)
        })
    });
    let threads: Vec<_> = threads.collect();
    let done = threads.into_iter().map(|thread| thread.join().unwrap());
    let (results, _groups): (_, Vec<Group>) = done.unzip();
    results
}

fn all_play(
    kind: Kind,
    world: usize,
    calls: impl Iterator<Item = (Call, usize)> + Clone + Send + 'static,
) {
    let seats = kind.seats(world, WORDS + world, PATIENCE);
    together(seats, move |group| play(kind, group, calls.clone()));
}

#[test]
fn every_frame_is_read_as_it_was_written() {
    let calls = (0..2000).map(|round| {
        let call = match round * 7 % 5 {
            0 => Call::Broadcast,
            1 => Call::Gather,
            _ => Call::Exchange,
        };
        (call, round * 37 % WORDS)
    });
    for kind in KINDS {
        for world in [1, 2, 3, 5] {
            all_play(kind, world, calls.clone());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_order_of_calls_goes_through(
        world in 1usize..5,
        calls in prop::collection::vec((0..3usize, 0..WORDS), 0..40),
    ) {
        let calls = calls.into_iter().map(|(call, len)| {
            ([Call::Broadcast, Call::Gather, Call::Exchange][call], len)
        });
        let calls: Vec<_> = calls.collect();
        for kind in KINDS {
            all_play(kind, world, calls.clone().into_iter());
        }
    }
}

/// A frame that fills the buffers of a connection many times over, from both sides at once.
#[test]
fn large_frames_pass_each_other() {
    let len = 3 << 20;
    for kind in KINDS {
        together(kind.seats(2, len, PATIENCE), move |group| {
            let own = group.rank() as f32 + 1.0;
            group.part(len).unwrap().fill(own);
            let parts = group.exchange().unwrap();
            for (part, is) in parts.iter().zip([1.0, 2.0]) {
                assert!(part.len() == len && part.iter().all(|&x| x == is));
            }
            group.broadcast(&mut vec![7; len]).unwrap();
        });
    }
}

#[test]
fn a_rank_that_leaves_is_lost_to_who_waits() {
    for kind in KINDS {
        let [mut first, second] = kind.pair(PATIENCE);
        drop(second);
        first.part(1).unwrap();
        let error = first.exchange().err().unwrap();
        assert!(
            matches!(error, CollectiveError::PeerLost { rank: 1 }),
            "{kind:?}"
        );

        let [first, mut second] = kind.pair(PATIENCE);
        let waiting = thread::spawn(move || second.broadcast(&mut Vec::new()));
        drop(first);
        let error = waiting.join().unwrap().unwrap_err();
        assert!(
            matches!(error, CollectiveError::PeerLost { rank: 0 }),
            "{kind:?}"
        );
    }
}

/// Though they may see each other leave first.
#[test]
fn every_rank_learns_who_is_lost() {
    for kind in KINDS {
        let started = Instant::now();
        let threads = kind.seats(3, 16, PATIENCE).into_iter().map(|join| {
            thread::spawn(move || {
                let mut group = join();
                if group.rank() == 2 {
                    return None;
                }
                group.part(1).unwrap();
                group.exchange().err()
            })
        });
        let threads: Vec<_> = threads.collect();
        for error in threads.into_iter().take(2).map(|t| t.join().unwrap()) {
            assert!(
                matches!(error, Some(CollectiveError::PeerLost { rank: 2 })),
                "{kind:?}: {error:?}"
            );
        }
        assert!(started.elapsed() < PATIENCE / 2);
    }
}

#[test]
fn a_rank_that_does_not_come_is_late() {
    for kind in KINDS {
        let [mut first, _second] = kind.pair(Duration::from_millis(5));
        first.part(1).unwrap();
        let error = first.exchange().err().unwrap();
        assert!(
            matches!(error, CollectiveError::Timeout { rank: 1, .. }),
            "{kind:?}"
        );
    }
}

#[test]
fn ranks_that_disagree_are_told() {
    for kind in KINDS {
        let [mut first, mut second] = kind.pair(PATIENCE);
        first.part(3).unwrap();
        let other = thread::spawn(move || {
            second.part(2).unwrap();
            second.exchange().err().unwrap()
        });
        let errors = [first.exchange().err().unwrap(), other.join().unwrap()];
        assert!(
            errors
                .iter()
                .any(|e| matches!(e, CollectiveError::Mismatch { .. })),
            "{kind:?}: {errors:?}"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for kind in KINDS {
        let [mut first, _second] = kind.pair(PATIENCE);
        let error = first.part(1025).err().unwrap();
        let max = 1024;
        assert!(matches!(error, CollectiveError::TooLarge { words: 1025, max: m } if m == max));
        let error = first.broadcast(&mut vec![0; 1025]).unwrap_err();
        assert!(matches!(error, CollectiveError::TooLarge { .. }));
    }
}

#[test]
fn a_pace_is_measured_together() {
    for kind in KINDS {
        let measure = |group: &mut dyn Collective| Pace::measure(group, 1 << 16).unwrap();
        for pace in together(kind.seats(3, 1 << 16, PATIENCE), measure) {
            assert!(
                pace.latency < PATIENCE && pace.rate > 1e6,
                "{kind:?}: {pace:?}"
            );
            assert!(pace.exchange(1 << 20) > pace.exchange(1));
        }
    }
}
