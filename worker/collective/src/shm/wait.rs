//! Waiting for the number of a rank: spin, then sleep on it, and look who is still there.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::futex;

use super::segment::{Header, Segment};
use crate::CollectiveError;

/// How long a rank spins before it sleeps within a step: longer than uneven shares of a layer
/// are apart, as a sleeper is late for the next one.
const SPIN: Duration = Duration::from_micros(250);

/// The same where nobody waits for the result, between steps.
const SPIN_AT_REST: Duration = Duration::from_micros(50);

/// Between looks at the other ranks while asleep: the death of a process wakes nobody.
const NAP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// The same where nobody waits for the result, between steps.
const REST: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// Whether `number` is `target` or later; numbers wrap.
fn reached(number: u32, target: u32) -> bool {
    number.wrapping_sub(target) < 1 << 31
}

/// The other ranks, as processes.
pub(super) struct Peers {
    rank: usize,
    /// `None` for ranks of this process.
    processes: Vec<Option<OwnedFd>>,
}

impl Peers {
    /// While ranks are still on their way.
    pub(super) fn none(rank: usize) -> Self {
        Self {
            rank,
            processes: Vec::new(),
        }
    }

    /// Of a segment that all ranks are in.
    pub(super) fn new(segment: &Segment, rank: usize) -> Result<Self, CollectiveError> {
        let own = std::process::id();
        let processes = (0..segment.world()).map(|peer| {
            let pid = segment.header(peer).pid.load(Ordering::Acquire);
            if pid == own {
                return Ok(None);
            }
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or(CollectiveError::Segment)?;
            let process = pidfd_open(pid, PidfdFlags::empty());
            Ok(Some(
                process.map_err(|_| CollectiveError::PeerLost { rank: peer })?,
            ))
        });
        Ok(Self {
            rank,
            processes: processes.collect::<Result<_, CollectiveError>>()?,
        })
    }

    /// Fails if a rank has left, and blames whom that one blamed, or if a process has ended.
    fn check(&self, segment: &Segment) -> Result<(), CollectiveError> {
        for rank in (0..segment.world()).filter(|&rank| rank != self.rank) {
            let left = segment.header(rank).left.load(Ordering::Acquire);
            if let Some(rank) = (left as usize).checked_sub(1) {
                return Err(CollectiveError::PeerLost { rank });
            }
        }
        for (rank, process) in self.processes.iter().enumerate() {
            let Some(process) = process else { continue };
            let mut ends = [PollFd::new(process, PollFlags::IN)];
            // Its descriptor becomes readable at its end.
            let now = Timespec::default();
            if poll(&mut ends, Some(&now)).is_ok_and(|ready| ready > 0) {
                return Err(CollectiveError::PeerLost { rank });
            }
        }
        Ok(())
    }

    /// Waits until rank `peer` has begun call `target`: for ever, or for `patience`. An error
    /// is this rank's end in the segment.
    pub(super) fn wait(
        &self,
        segment: &Segment,
        peer: usize,
        target: u32,
        patience: Option<Duration>,
    ) -> Result<(), CollectiveError> {
        self.try_wait(segment, peer, target, patience)
            .inspect_err(|error| {
                let blamed = error.blamed().unwrap_or(self.rank);
                leave(segment.header(self.rank), blamed);
            })
    }

    fn try_wait(
        &self,
        segment: &Segment,
        peer: usize,
        target: u32,
        patience: Option<Duration>,
    ) -> Result<(), CollectiveError> {
        let header = segment.header(peer);
        let here = || reached(header.number.load(Ordering::Acquire), target);
        if here() {
            return Ok(());
        }
        let started = Instant::now();
        let (spin, nap) = match patience {
            Some(_) => (SPIN, NAP),
            None => (SPIN_AT_REST, REST),
        };
        loop {
            for _ in 0..64 {
                std::hint::spin_loop();
                if here() {
                    return Ok(());
                }
            }
            if started.elapsed() > spin {
                break;
            }
            // Whoever waits for this core may be whom this rank waits for.
            std::thread::yield_now();
        }
        loop {
            self.check(segment)?;
            if sleep(header, target, &nap) {
                return Ok(());
            }
            if let Some(after) = patience.filter(|patience| started.elapsed() > *patience) {
                return Err(CollectiveError::Timeout { rank: peer, after });
            }
        }
    }
}

/// Sleeps until the number changes, for at most `nap`; whether it has reached `target`.
fn sleep(header: &Header, target: u32, nap: &Timespec) -> bool {
    header.sleepers.fetch_add(1, Ordering::SeqCst);
    let seen = header.number.load(Ordering::SeqCst);
    if !reached(seen, target) {
        // Woken, late, or the number has changed already: the caller looks again in any case.
        let _ = futex::wait(&header.number, futex::Flags::empty(), seen, Some(nap));
    }
    header.sleepers.fetch_sub(1, Ordering::SeqCst);
    reached(header.number.load(Ordering::Acquire), target)
}

/// Says that a rank has begun call `number`, after what it wrote before.
pub(super) fn publish(header: &Header, number: u32) {
    header.number.store(number, Ordering::SeqCst);
    if header.sleepers.load(Ordering::SeqCst) > 0 {
        wake(header);
    }
}

/// Says that a rank makes no further call, because of rank `blamed`. The first reason stays.
pub(super) fn leave(header: &Header, blamed: usize) {
    let why = blamed as u32 + 1;
    let first = header
        .left
        .compare_exchange(0, why, Ordering::AcqRel, Ordering::Relaxed);
    if first.is_ok() {
        wake(header);
    }
}

/// Wakes whoever sleeps on the number.
fn wake(header: &Header) {
    // It fails for a wrong address only.
    let _ = futex::wake(&header.number, futex::Flags::empty(), i32::MAX as u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_wrap() {
        assert!(reached(5, 5) && reached(6, 5) && !reached(4, 5));
        assert!(reached(2, u32::MAX) && !reached(u32::MAX, 2));
    }
}
