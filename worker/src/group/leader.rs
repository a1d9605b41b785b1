//! Rank 0's view of the group: starts the other ranks, calls them to meet, and calls them again
//! when one was lost.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shoal_collective::shm::{Ring, Segment};

use super::line::{Order, Part};
use super::member::{Member, RankCommand};
use super::{Formed, GroupError, Lead, Watch};
use crate::epoch;

/// Meetings that are called in a row before the group is given up.
const ATTEMPTS: u32 = 5;
/// Before the second meeting; doubled with every further one.
const PAUSE: Duration = Duration::from_millis(50);
/// What loading a part may take.
const LOADING: Duration = Duration::from_secs(600);

/// Rank 0's part in keeping the group.
pub(super) struct Leader {
    command: RankCommand,
    /// Of rank 0; the others' differ in the rank.
    part: Part,
    patience: Duration,
    /// By rank, from 1; `None` where it must be started.
    members: Vec<Option<Member>>,
    numerics_id: [u8; 32],
    epoch: u64,
    watch: Arc<Watch>,
}

impl Leader {
    /// Starts all ranks; they load while rank 0 does.
    pub(super) fn start(
        command: &RankCommand,
        patience: Duration,
        part: Part,
        watch: Arc<Watch>,
    ) -> Result<Self, GroupError> {
        let mut leader = Self {
            command: command.clone(),
            members: (1..part.world).map(|_| None).collect(),
            part,
            patience,
            numerics_id: [0; 32],
            epoch: 0,
            watch,
        };
        leader.fill()?;
        Ok(leader)
    }

    /// Starts the ranks that are not there.
    fn fill(&mut self) -> Result<(), GroupError> {
        for (index, slot) in self.members.iter_mut().enumerate() {
            if !slot.as_mut().is_some_and(Member::is_alive) {
                let rank = index + 1;
                let part = Part {
                    rank,
                    ..self.part.clone()
                };
                *slot = None;
                let watch = Arc::clone(&self.watch);
                *slot = Some(Member::start(&self.command, part, watch)?);
            }
        }
        Ok(())
    }

    fn meet(&mut self, words: usize) -> Result<Ring, GroupError> {
        self.fill()?;
        let until = Instant::now() + LOADING;
        let wanted = || !self.watch.closing.load(Ordering::Acquire);
        for index in 0..self.members.len() {
            let Some(member) = &mut self.members[index] else {
                continue;
            };
            if !std::mem::take(&mut member.fresh) {
                continue;
            }
            let result = member.loaded(until, wanted);
            match result {
                Ok(id) if id == self.numerics_id => {}
                Ok(_) => return Err(GroupError::Different { rank: index + 1 }),
                Err(error) => {
                    self.members[index] = None;
                    return Err(error);
                }
            }
        }
        self.epoch = (self.epoch + 1).max(epoch::now());
        let (segment, file) = Segment::create(self.part.world, self.epoch, words)?;
        let order = Order::Meet {
            epoch: self.epoch,
            patience_ms: self.patience.as_millis() as u64,
        };
        for index in 0..self.members.len() {
            let Some(member) = &self.members[index] else {
                continue;
            };
            if let Err(error) = member.order(&order, Some(file.as_fd())) {
                self.members[index] = None;
                return Err(error);
            }
        }
        let seat = Ring::join(Arc::new(segment), 0, self.epoch, self.patience);
        seat.map_err(|error| {
            if let Some(rank) = error.blamed() {
                self.end(rank);
            }
            GroupError::Meeting(error)
        })
    }
}

impl Lead for Leader {
    fn expect(&mut self, numerics_id: [u8; 32]) {
        self.numerics_id = numerics_id;
    }

    fn dead(&mut self) -> Option<usize> {
        let mut members = self.members.iter_mut();
        let dead = members.position(|member| !member.as_mut().is_some_and(Member::is_alive));
        dead.map(|index| index + 1)
    }

    fn end(&mut self, rank: usize) {
        if let Some(member) = rank.checked_sub(1).and_then(|i| self.members.get_mut(i)) {
            *member = None;
        }
    }

    /// Starts the ranks that are missing, and calls all to meet in new memory.
    fn form(&mut self, words: usize) -> Result<Option<Formed>, GroupError> {
        let started = Instant::now();
        let mut attempt = 0;
        let seat = loop {
            let error = match self.meet(words) {
                Ok(seat) => break seat,
                Err(error) => error,
            };
            attempt += 1;
            let again = attempt < ATTEMPTS && error.is_passing();
            if !again || self.watch.closing.load(Ordering::Acquire) {
                return Err(error);
            }
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the ranks did not meet"
            );
            std::thread::sleep(PAUSE * 2u32.pow(attempt - 1));
        };
        let ranks: Vec<u32> = self.members.iter().flatten().map(Member::pid).collect();
        tracing::info!(
            world = self.part.world,
            epoch = self.epoch,
            ?ranks,
            milliseconds = started.elapsed().as_millis() as u64,
            "the group is whole"
        );
        Ok(Some(Formed {
            seat: Box::new(seat),
            pace: None,
        }))
    }
}
