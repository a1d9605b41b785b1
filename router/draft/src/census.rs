//! How many users were answered with the same words.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use shoal_core::{DraftScope, TokenId};

/// Tokens of a run that is counted.
pub(crate) const RUN: usize = 8;
/// Users that can be told apart in one run.
pub(crate) const MOST_USERS: usize = 4;

/// Runs of tokens and the users who were answered with them, for a limited time. Users who
/// cannot be told apart count as one: too few at worst.
#[derive(Debug)]
pub(crate) struct Census {
    /// Nobody can choose runs that collide.
    hasher: RandomState,
    /// What was seen since the last turn, and what was seen before and not since.
    young: FxHashMap<u64, [u16; MOST_USERS]>,
    old: FxHashMap<u64, [u16; MOST_USERS]>,
    /// Runs of a generation.
    most: usize,
    /// A generation's time.
    span: Duration,
    turned: Instant,
}

impl Census {
    /// A census of so many runs at most, each for `ttl` at most.
    pub(crate) fn new(most: usize, ttl: Duration, now: Instant) -> Self {
        Self {
            hasher: RandomState::new(),
            young: HashMap::default(),
            old: HashMap::default(),
            most: (most / 2).max(1),
            span: ttl / 2,
            turned: now,
        }
    }

    /// Lets the older generation go where its time is over or the younger is full.
    pub(crate) fn turn(&mut self, now: Instant) {
        let over = now.saturating_duration_since(self.turned) >= self.span;
        if over || self.young.len() >= self.most {
            self.old = std::mem::take(&mut self.young);
            self.turned = now;
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.young = HashMap::default();
        self.old = HashMap::default();
    }

    /// Counts one user of a tenant for a run of [`RUN`] tokens; gives the run's users.
    pub(crate) fn count(&mut self, tenant: &DraftScope, run: &[TokenId], user: u16) -> usize {
        let key = self.hasher.hash_one((tenant, run));
        let users = match self.young.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.old.remove(&key).unwrap_or_default())
            }
        };
        // Zero is nobody.
        let user = user.max(1);
        for (i, known) in users.iter_mut().enumerate() {
            if *known == 0 {
                *known = user;
            }
            if *known == user {
                return users[i..]
                    .iter()
                    .position(|&u| u == 0)
                    .unwrap_or(MOST_USERS - i)
                    + i;
            }
        }
        MOST_USERS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN_A: [TokenId; RUN] = [1, 2, 3, 4, 5, 6, 7, 8];

    fn tenant(name: &str) -> DraftScope {
        DraftScope::tenant("m", b"t", name, "")
    }

    #[test]
    fn users_count_once_and_tenants_apart() {
        let mut census = Census::new(100, Duration::from_secs(100), Instant::now());
        let a = tenant("a");
        let counts = [7, 7, 0, 9, 7, 0, 8, 8, 5].map(|user| census.count(&a, &RUN_A, user));
        assert_eq!(counts, [1, 1, 2, 3, 3, 3, 4, 4, 4]);
        assert_eq!(census.count(&tenant("b"), &RUN_A, 7), 1);
        assert_eq!(census.count(&a, &[9; RUN], 7), 1);
    }

    #[test]
    fn what_is_old_is_forgotten_and_what_is_seen_is_not() {
        let start = Instant::now();
        let mut census = Census::new(100, Duration::from_secs(100), start);
        let a = tenant("a");
        census.count(&a, &RUN_A, 1);
        census.turn(start + Duration::from_secs(60));
        assert_eq!(census.count(&a, &RUN_A, 2), 2);
        census.turn(start + Duration::from_secs(120));
        census.turn(start + Duration::from_secs(180));
        assert_eq!(census.count(&a, &RUN_A, 3), 1);
    }

    #[test]
    fn it_is_bounded() {
        let now = Instant::now();
        let mut census = Census::new(100, Duration::from_secs(100), now);
        for run in 0..1000 {
            census.turn(now);
            census.count(&tenant("a"), &[run; RUN], 1);
        }
        assert!(census.young.len() + census.old.len() <= 100);
    }
}
