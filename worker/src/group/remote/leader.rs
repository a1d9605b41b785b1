//! Rank 0's view of a group of ranks elsewhere: waits for them, and calls them to meet.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shoal_collective::tcp::{Door, Mesh, Payload, Seat, Secret, Terms, instance};
use shoal_collective::{CollectiveError, Pace};
use shoal_fabric::backoff::Backoff;

use super::house::House;
use super::line::Order;
use crate::config::RemoteConfig;
use crate::epoch;
use crate::group::line::Part;
use crate::group::{Formed, GroupError, Lead, Watch};

/// How long it waits for ranks at one time.
const MOMENT: Duration = Duration::from_millis(50);
/// Before ranks that did not meet are called again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// See the [module](self).
pub(in crate::group) struct Leader {
    house: Arc<House>,
    /// Others come in while this is here.
    _door: Door,
    secret: Arc<Secret>,
    instance: u64,
    world: usize,
    payload: Payload,
    patience: Duration,
    numerics_id: [u8; 32],
    epoch: u64,
    /// The ranks that the log says are missing.
    told: Vec<usize>,
    pauses: Backoff,
    watch: Arc<Watch>,
}

impl Leader {
    /// Opens the door to the other ranks.
    pub(in crate::group) fn start(
        settings: &RemoteConfig,
        patience: Duration,
        part: Part,
        watch: Arc<Watch>,
    ) -> Result<Self, GroupError> {
        let secret = Arc::new(Secret::read(&settings.secret)?);
        let world = part.world;
        let house = Arc::new(House::new(part, Arc::clone(&watch)));
        let address = settings.listen;
        let door = Door::open(address, Arc::clone(&secret), Arc::clone(&house) as _);
        let door = door.map_err(|source| GroupError::Listen { address, source })?;
        tracing::info!(address = %door.address(), world, "ranks may come");
        Ok(Self {
            house,
            _door: door,
            secret,
            instance: instance().map_err(GroupError::Line)?,
            world,
            payload: settings.payload,
            patience,
            numerics_id: [0; 32],
            epoch: 0,
            told: Vec::new(),
            pauses: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            watch,
        })
    }

    fn meet(&mut self, words: usize) -> Result<(Mesh, Pace, Vec<SocketAddr>), CollectiveError> {
        let latest = self.epoch.max(self.house.epoch());
        self.epoch = (latest + 1).max(epoch::now());
        let (epoch, patience) = (self.epoch, self.patience);
        // None is refused that is called.
        self.house.lobby.expect(epoch);
        let addresses = self.house.call(|below| Order::Meet {
            epoch,
            patience_ms: patience.as_millis() as u64,
            words,
            below,
        });
        let seat = Seat {
            rank: 0,
            below: &[],
            world: self.world,
            lobby: &self.house.lobby,
            secret: &self.secret,
            instance: self.instance,
        };
        let mut mesh = seat.take(Terms {
            epoch,
            payload: self.payload,
            words,
            patience,
        })?;
        let pace = Pace::measure(&mut mesh, words)?;
        Ok((mesh, pace, addresses))
    }
}

impl Lead for Leader {
    fn expect(&mut self, numerics_id: [u8; 32]) {
        self.numerics_id = numerics_id;
    }

    fn dead(&mut self) -> Option<usize> {
        self.house.gone()
    }

    fn end(&mut self, rank: usize) {
        self.house.end(rank);
    }

    fn form(&mut self, words: usize) -> Result<Option<Formed>, GroupError> {
        if self.watch.closing.load(Ordering::Acquire) {
            return Err(GroupError::Closing);
        }
        let missing = self.house.missing(self.numerics_id, MOMENT);
        if !missing.is_empty() {
            if missing != self.told {
                tracing::info!(ranks = ?missing, "waiting for ranks");
                self.told = missing;
            }
            return Ok(None);
        }
        let started = Instant::now();
        let (seat, pace, ranks) = match self.meet(words) {
            Ok(met) => met,
            Err(error) => {
                if let Some(rank) = error.blamed() {
                    self.house.end(rank);
                }
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the ranks did not meet"
                );
                std::thread::sleep(self.pauses.pause());
                return Ok(None);
            }
        };
        self.told.clear();
        self.pauses.reset();
        let ranks: Vec<IpAddr> = ranks.iter().map(SocketAddr::ip).collect();
        tracing::info!(
            world = self.world,
            epoch = self.epoch,
            ?ranks,
            payload = self.payload.name(),
            milliseconds = started.elapsed().as_millis() as u64,
            "the group is whole"
        );
        Ok(Some(Formed {
            seat: Box::new(seat),
            pace: Some(pace),
        }))
    }
}
