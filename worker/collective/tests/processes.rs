//! Ranks that are processes: this program starts itself again for each of them.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use shoal_collective::shm::{Ring, Segment};
use shoal_collective::{Collective, CollectiveError, fd};

type Outcome = Result<(), Box<dyn Error>>;

const ROWS: usize = 4096;
/// Longer than a busy machine holds a process up.
const PATIENCE: Duration = Duration::from_secs(20);

type Test = fn() -> Outcome;

fn main() -> Outcome {
    if std::env::args().nth(1).as_deref() == Some("--rank") {
        return rank();
    }
    let tests: [(&str, Test); 3] = [
        ("sums are the same everywhere", sums),
        ("a killed rank is seen at once", killed),
        ("a stopped rank is seen in time", stopped),
    ];
    for (name, test) in tests {
        test()?;
        println!("ok: {name}");
    }
    Ok(())
}

/// A started rank.
struct Rank(Child);

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Rank {
    fn signal(&self, signal: Signal) -> Outcome {
        let pid = Pid::from_raw(self.0.id().try_into()?).ok_or("no pid")?;
        Ok(kill_process(pid, signal)?)
    }
}

/// Rank 0 here, the others as processes.
fn group(world: usize, patience: Duration) -> Result<(Ring, Vec<Rank>), Box<dyn Error>> {
    let (segment, file) = Segment::create(world, 9, ROWS)?;
    let others = (1..world).map(|rank| {
        let (line, theirs) = UnixStream::pair()?;
        let process = Command::new(std::env::current_exe()?)
            .args(["--rank", &rank.to_string()])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        fd::send(&line, b"join", Some(file.as_fd()))?;
        Ok::<_, Box<dyn Error>>(Rank(process))
    });
    let others = others.collect::<Result<_, _>>()?;
    // Processes start first; this patience is theirs too.
    Ok((Ring::join(Arc::new(segment), 0, 9, patience)?, others))
}

/// A rank: adds up what all ranks give, as rank 0 asks, and tells it the sum's bits.
fn rank() -> Outcome {
    let number: usize = std::env::args().nth(2).ok_or("which rank?")?.parse()?;
    let line = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (message, file) = fd::receive(&line)?.ok_or("no message")?;
    assert_eq!(message, b"join");
    let segment = Segment::open(file.ok_or("no memory")?)?;
    let mut ring = Ring::join(Arc::new(segment), number, 9, PATIENCE)?;
    let mut plan = Vec::new();
    loop {
        match ring.broadcast(&mut plan) {
            Ok(()) => {}
            // Rank 0 is done.
            Err(CollectiveError::PeerLost { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let hash = step(&mut ring, plan[0] as usize, plan[1])?;
        ring.part(2)?.copy_from_slice(&halves(hash));
        ring.gather()?;
    }
}

fn halves(hash: u64) -> [f32; 2] {
    // 16 bits fit a float exactly; that much of the hash is plenty.
    [(hash & 0xffff) as f32, (hash >> 16 & 0xffff) as f32]
}

/// Adds every rank's numbers in their order; a hash of the sums' bits.
fn step(ring: &mut Ring, len: usize, round: u32) -> Result<u64, CollectiveError> {
    let rank = ring.rank() as u32;
    for (at, x) in ring.part(len)?.iter_mut().enumerate() {
        // Of magnitudes so different that another order gives other bits.
        let bits = (at as u32).wrapping_mul(2_654_435_761) ^ (round * 97 + rank * 7);
        *x = (bits % 2000) as f32 * 10f32.powi((bits >> 13) as i32 % 9 - 4) - 700.0;
    }
    let parts = ring.exchange()?;
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for at in 0..len {
        let sum = parts.iter().fold(0f32, |sum, part| sum + part[at]);
        hash = (hash ^ u64::from(sum.to_bits())).wrapping_mul(0x0100_0000_01b3);
    }
    Ok(hash)
}

fn sums() -> Outcome {
    for world in [2, 3] {
        let (mut ring, others) = group(world, PATIENCE)?;
        for round in 0..300u32 {
            let len = 1 + round as usize * 131 % (ROWS - 1);
            ring.broadcast(&mut vec![len as u32, round])?;
            let own = halves(step(&mut ring, len, round)?);
            ring.part(2)?.copy_from_slice(&own);
            let all = ring.gather()?.ok_or("rank 0 gathers")?;
            assert!(all.iter().all(|hash| **hash == own), "round {round}");
        }
        drop(ring);
        for mut other in others {
            assert!(other.0.wait()?.success());
        }
    }
    Ok(())
}

fn killed() -> Outcome {
    let (mut ring, others) = group(3, PATIENCE)?;
    let started = Instant::now();
    others[1].signal(Signal::KILL)?;
    ring.broadcast(&mut vec![1, 0])?;
    let error = loop {
        // It may have died after its part of a step.
        if let Err(error) = step(&mut ring, 1, 0) {
            break error;
        }
        ring.gather()?;
        ring.broadcast(&mut vec![1, 0])?;
    };
    assert!(
        matches!(error, CollectiveError::PeerLost { rank: 2 }),
        "{error}"
    );
    // Long before anybody would lose patience.
    assert!(started.elapsed() < PATIENCE / 4);
    Ok(())
}

fn stopped() -> Outcome {
    let (mut ring, others) = group(2, Duration::from_secs(2))?;
    // It answers, so it waits for the next step now.
    ring.broadcast(&mut vec![8, 1])?;
    step(&mut ring, 8, 1)?;
    ring.gather()?;
    others[0].signal(Signal::STOP)?;
    let error = loop {
        let mut round = || {
            ring.broadcast(&mut vec![8, 1])?;
            step(&mut ring, 8, 1)?;
            ring.gather().map(|_| ())
        };
        if let Err(error) = round() {
            break error;
        }
    };
    assert!(
        matches!(error, CollectiveError::Timeout { rank: 1, .. }),
        "{error}"
    );
    Ok(())
}
