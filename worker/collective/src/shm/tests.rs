use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};

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

fn memory(bytes: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("other", flags).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

#[test]
fn other_memory_is_no_segment() {
    for bytes in [0, 100, 4096, 1 << 20] {
        let file = memory(bytes);
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let error = Segment::open(file).err().unwrap();
        assert!(matches!(error, CollectiveError::Segment));
    }
}

#[test]
fn memory_that_may_shrink_is_no_segment() {
    let (_segment, file) = Segment::create(2, 3, 1).unwrap();
    let size = fstat(&file).unwrap().st_size as u64;
    let copy = memory(size);
    let mut bytes = vec![0; size as usize];
    pread(&file, &mut bytes, 0).unwrap();
    pwrite(&copy, &bytes, 0).unwrap();
    let error = Segment::open(&copy).err().unwrap();
    assert!(matches!(error, CollectiveError::Segment));
    fcntl_add_seals(&copy, SealFlags::SHRINK).unwrap();
    assert_eq!(Segment::open(&copy).unwrap().epoch(), 3);
}
