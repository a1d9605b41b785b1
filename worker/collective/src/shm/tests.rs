use std::os::fd::AsFd;

use super::*;

/// Longer than a busy machine holds a thread up.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_rank_that_does_not_join_is_late() {
    let short = Duration::from_millis(5);
    let (segment, _file) = Segment::create(2, 3, 1).unwrap();
    let error = Ring::join(Arc::new(segment), 0, 3, short).err().unwrap();
    assert!(matches!(error, CollectiveError::Timeout { rank: 1, .. }));
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
fn segments_have_a_size() {
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
