//! Erasures that no late text undoes.
//!
//! An erasure takes every text that its maker's router wrote before it heard of the erasure. So
//! each router writes into its log when it heard, and whoever knows that place tells a text
//! from before it from one after it, in whatever order they come, and without a clock. A router
//! that has not heard yet, or never will, is believed nothing of those who were forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use shoal_core::Subject;

use crate::record::{Erased, Stamp, Whose};

/// An erasure outlives the texts that it takes by so much, for those that are on their way.
pub(crate) const ON_THEIR_WAY: Duration = Duration::from_secs(60);

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Erasures {
    by_tenant: BTreeMap<Subject, BTreeMap<Stamp, Known>>,
}

#[derive(Debug)]
struct Known {
    user: Option<Subject>,
    made: Instant,
    /// By log: since when its router has known it.
    heard: BTreeMap<u64, u64>,
}

impl Erasures {
    /// Takes note of an erasure, and of who has heard of it. True: it is new here, and what it
    /// takes has yet to be forgotten.
    pub fn hear(&mut self, erased: &Erased) -> bool {
        let tenant = self.by_tenant.entry(erased.whose.tenant).or_default();
        let is_new = !tenant.contains_key(&erased.id);
        let known = tenant.entry(erased.id).or_insert_with(|| Known {
            user: erased.whose.user,
            made: erased.made,
            heard: BTreeMap::new(),
        });
        let Stamp { origin, offset } = erased.stamp;
        let since = known.heard.entry(origin).or_insert(offset);
        *since = offset.max(*since);
        is_new
    }

    /// Whether a text was written by a router that had yet to hear of an erasure which takes it.
    pub fn cover(&self, text: Stamp, whose: &Whose) -> bool {
        let known = self.by_tenant.get(&whose.tenant).into_iter().flatten();
        known.into_iter().any(|(_, known)| {
            let erasure = Whose {
                tenant: whose.tenant,
                user: known.user,
            };
            let heard = known.heard.get(&text.origin);
            erasure.takes(whose) && heard.is_none_or(|&since| text.offset < since)
        })
    }

    /// What a router heard of at these offsets of its log, in no order.
    pub fn heard_by(&self, origin: u64, offsets: Range<u64>) -> impl Iterator<Item = Erased> {
        let all = self
            .by_tenant
            .iter()
            .flat_map(|(tenant, known)| known.iter().map(move |(id, known)| (*tenant, *id, known)));
        all.filter_map(move |(tenant, id, known)| {
            let offset = *known.heard.get(&origin).filter(|at| offsets.contains(at))?;
            Some(Erased {
                stamp: Stamp { origin, offset },
                id,
                whose: Whose {
                    tenant,
                    user: known.user,
                },
                made: known.made,
            })
        })
    }

    /// Whether all of these routers have heard of an erasure; also once it is out of date.
    pub fn is_heard(&self, id: Stamp, by: &BTreeSet<u64>) -> bool {
        let known = self.by_tenant.values().find_map(|known| known.get(&id));
        known.is_none_or(|known| by.iter().all(|origin| known.heard.contains_key(origin)))
    }

    /// Erasures of a tenant.
    pub fn count(&self, tenant: &Subject) -> usize {
        self.by_tenant.get(tenant).map_or(0, BTreeMap::len)
    }

    /// Lets go what was asked for so long ago that no text from before it is left, where texts
    /// are kept for `ttl`.
    pub fn expire(&mut self, now: Instant, ttl: Duration) {
        let Some(before) = now.checked_sub(ttl + ON_THEIR_WAY) else {
            return;
        };
        self.by_tenant.retain(|_, known| {
            known.retain(|_, known| known.made >= before);
            !known.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(origin: u64, offset: u64) -> Stamp {
        Stamp { origin, offset }
    }

    fn whose(user: Option<&str>) -> Whose {
        let tenant = Subject::tenant("acme");
        Whose {
            tenant,
            user: user.map(|user| tenant.user(user)),
        }
    }

    fn heard(id: Stamp, by: Stamp, user: Option<&str>) -> Erased {
        Erased {
            stamp: by,
            id,
            whose: whose(user),
            made: Instant::now(),
        }
    }

    #[test]
    fn a_text_from_before_its_router_heard_is_covered_and_one_from_after_is_not() {
        let mut erasures = Erasures::default();
        let id = stamp(1, 5);
        assert!(erasures.hear(&heard(id, id, Some("a"))));
        assert!(!erasures.hear(&heard(id, stamp(2, 9), Some("a"))));
        let (own, other, shared) = (whose(Some("a")), whose(Some("b")), whose(None));
        for (text, covered) in [
            (stamp(1, 4), true),
            (stamp(1, 6), false),
            (stamp(2, 8), true),
            (stamp(2, 10), false),
            // It has not heard.
            (stamp(3, 1000), true),
        ] {
            assert_eq!(erasures.cover(text, &own), covered, "{text:?}");
            assert_eq!(erasures.cover(text, &shared), covered, "{text:?}");
            assert!(!erasures.cover(text, &other), "{text:?}");
        }
        let id = stamp(2, 20);
        erasures.hear(&heard(id, id, None));
        assert!(erasures.cover(stamp(1, 6), &other));
        let all: Vec<_> = erasures.heard_by(2, 0..100).map(|e| e.stamp).collect();
        assert_eq!(all.len(), 2);
        assert!(erasures.heard_by(2, 10..20).next().is_none());
    }

    #[test]
    fn it_is_known_who_has_heard_and_what_is_old_is_forgotten() {
        let mut erasures = Erasures::default();
        let id = stamp(1, 5);
        let first = heard(id, id, Some("a"));
        erasures.hear(&first);
        assert!(erasures.is_heard(id, &[1].into()) && !erasures.is_heard(id, &[1, 2].into()));
        let age = Duration::from_secs(1);
        erasures.expire(first.made + ON_THEIR_WAY + age, age);
        assert_eq!(erasures.count(&first.whose.tenant), 1);
        erasures.expire(Instant::now() + ON_THEIR_WAY + 2 * age, age);
        assert_eq!(erasures.count(&first.whose.tenant), 0);
        assert!(!erasures.cover(stamp(3, 0), &first.whose));
    }
}
