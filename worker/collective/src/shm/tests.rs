use std::os::fd::AsFd;
use std::thread;

use super::*;

/// Longer than a busy machine holds a thread up.
const PATIENCE: Duration = Duration::from_secs(20);
const WORDS: usize = 3000;

/// A value that tells rank, round and place.
fn value(rank: usize, round: usize, at: usize) -> f32 {
    (rank * 1_000_003 + round * 7919 + at) as f32
}

/// Work of a length that differs from rank to rank and round to round, so that every rank is
/// the last at times.
fn dawdle(rank: usize, round: usize) {
    let spins = (rank * 31 + round * 17) % 23 * 40;
    (0..spins).for_each(|_| std::hint::spin_loop());
}

/// Calls of every kind in an order that all ranks know; every frame is checked.
fn rounds(ring: &mut Ring, rounds: usize) {
    let (rank, world) = (ring.rank(), ring.world());
    let mut plan = Vec::new();
    for round in 0..rounds {
        dawdle(rank, round);
        let len = round * 37 % WORDS;
        match round * 7 % 5 {
            0 => {
                if rank == 0 {
                    plan.clear();
                    plan.extend((0..len).map(|at| (round + at) as u32));
                }
                ring.broadcast(&mut plan).unwrap();
                assert_eq!(plan.len(), len);
                assert!((0..len).all(|at| plan[at] == (round + at) as u32));
            }
            1 => {
                let own = ring.part(len + rank).unwrap();
                for (at, x) in own.iter_mut().enumerate() {
                    *x = value(rank, round, at);
                }
                let parts = ring.gather().unwrap();
                assert_eq!(parts.is_some(), rank == 0);
                for (rank, part) in parts.iter().flat_map(|parts| parts.iter().enumerate()) {
                    assert_eq!(part.len(), len + rank);
                    assert!((0..part.len()).all(|at| part[at] == value(rank, round, at)));
                }
            }
            _ => {
                let own = ring.part(len).unwrap();
                for (at, x) in own.iter_mut().enumerate() {
                    *x = value(rank, round, at);
                }
                let parts = ring.exchange().unwrap();
                assert_eq!(parts.len(), world);
                for (rank, part) in parts.iter().enumerate() {
                    assert_eq!(part.len(), len);
                    assert!((0..len).all(|at| part[at] == value(rank, round, at)));
                }
            }
        }
    }
}

#[test]
fn every_frame_is_read_as_it_was_written() {
    for world in [1, 2, 3, 5] {
        let seats = Ring::threads(world, WORDS + world, PATIENCE).unwrap();
        let threads: Vec<_> = seats
            .map(|join| thread::spawn(|| rounds(&mut join().unwrap(), 3000)))
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }
}

/// The two seats of a group of two.
fn pair(patience: Duration) -> [Ring; 2] {
    let mut seats = Ring::threads(2, 16, patience).unwrap();
    let (first, second) = (seats.next().unwrap(), seats.next().unwrap());
    let second = thread::spawn(|| second().unwrap());
    [first().unwrap(), second.join().unwrap()]
}

#[test]
fn a_rank_that_leaves_is_lost_to_who_waits() {
    let [mut first, second] = pair(PATIENCE);
    drop(second);
    first.part(1).unwrap();
    let error = first.exchange().err().unwrap();
    assert!(matches!(error, CollectiveError::PeerLost { rank: 1 }));

    let [first, mut second] = pair(PATIENCE);
    let waiting = thread::spawn(move || second.broadcast(&mut Vec::new()));
    drop(first);
    let error = waiting.join().unwrap().unwrap_err();
    assert!(matches!(error, CollectiveError::PeerLost { rank: 0 }));
}

#[test]
fn a_rank_that_does_not_come_is_late() {
    let short = Duration::from_millis(5);
    let [mut first, _second] = pair(short);
    first.part(1).unwrap();
    let error = first.exchange().err().unwrap();
    assert!(matches!(error, CollectiveError::Timeout { rank: 1, .. }));

    let (segment, _file) = Segment::create(2, 3, 1).unwrap();
    let error = Ring::join(Arc::new(segment), 0, 3, short).err().unwrap();
    assert!(matches!(error, CollectiveError::Timeout { rank: 1, .. }));
}

#[test]
fn ranks_that_disagree_are_told() {
    let [mut first, mut second] = pair(PATIENCE);
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
        "{errors:?}"
    );
}

#[test]
fn a_stale_epoch_is_refused() {
    let (segment, file) = Segment::create(2, 3, 1).unwrap();
    let again = Segment::open(file.as_fd()).unwrap();
    assert_eq!((again.epoch(), again.world()), (3, 2));
    let error = Ring::join(Arc::new(again), 0, 2, PATIENCE).err().unwrap();
    assert!(matches!(
        error,
        CollectiveError::StaleEpoch { ours: 2, theirs: 3 }
    ));
    drop(segment);
}

#[test]
fn what_does_not_fit_is_refused() {
    let [mut first, _second] = pair(PATIENCE);
    let error = first.part(1025).err().unwrap();
    assert!(matches!(
        error,
        CollectiveError::TooLarge {
            words: 1025,
            max: 1024
        }
    ));
    let error = first.broadcast(&mut vec![0; 1025]).unwrap_err();
    assert!(matches!(error, CollectiveError::TooLarge { .. }));
    assert!(Segment::create(0, 1, 1).is_err());
    assert!(Segment::create(crate::MAX_RANKS + 1, 1, 1).is_err());
    assert!(Segment::create(2, 1, usize::MAX / 2).is_err());
}

#[test]
fn other_memory_is_no_segment() {
    let file = rustix::fs::memfd_create("other", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    for bytes in [0, 100, 4096, 1 << 20] {
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let error = Segment::open(file.as_fd()).err().unwrap();
        assert!(matches!(error, CollectiveError::Segment));
    }
}
