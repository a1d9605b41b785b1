//! The logs of other routers: what they are told of this one's books, and what they tell.
//!
//! Each router numbers what it writes. Whoever follows says how far he knows each log, and gets
//! what still counts of the rest, each log in its order: texts that are left, public texts that
//! are not replaced, erasures for as long as a text from before them may be about. So a follower
//! that falls behind misses nothing but texts, and it does not matter who told him what, how
//! often, and in which order of the logs.

use std::sync::Arc;
use std::time::Instant;

use super::{Ledger, Positions};
use crate::log::Log;
use crate::record::{Entry, Erased, PublicText, Record, Stamp};

/// Logs that are known at one time; one that has nothing left goes first.
const MOST_LOGS: usize = 256;

impl Ledger {
    /// How far it knows the logs of others.
    pub fn positions(&self) -> Positions {
        let known = self.others.iter();
        known.map(|(&origin, log)| (origin, log.next)).collect()
    }

    /// What another router is to be told, of about `most` tokens, from `positions` on, which
    /// move behind it: of its own log, and of those of others where `all` are asked for.
    pub fn exchange(&self, positions: &mut Positions, all: bool, most: usize) -> Vec<Entry> {
        let mut left = most;
        let mut entries = Vec::new();
        let others = self.others.iter().filter(|_| all);
        let others = others.map(|(origin, log)| (*origin, log));
        for (origin, log) in std::iter::once((self.origin, &self.own)).chain(others) {
            let from = positions.get(&origin).copied().unwrap_or(0);
            let (records, next) = log.read(from, &mut left, Record::is_answer);
            let first = entries.len();
            entries.extend(records.into_iter().map(Entry::Text));
            let heard = self.erasures.heard_by(origin, from..next);
            entries.extend(heard.map(Entry::Erased));
            let public = self.public.written(origin, from..next).cloned();
            entries.extend(public.map(Entry::Public));
            entries[first..].sort_by_key(Entry::stamp);
            positions.insert(origin, next);
        }
        entries
    }

    /// Takes over what another router has told, each log in its order.
    pub fn take(&mut self, entries: Vec<Entry>, now: Instant) {
        for entry in entries {
            let Stamp { origin, offset } = entry.stamp();
            if origin == self.origin {
                continue;
            }
            let log = self.log(origin);
            if offset < log.next {
                continue;
            }
            log.next = offset;
            match entry {
                Entry::Text(record) => self.take_text(record, now),
                Entry::Erased(erased) => self.take_erased(&erased, now),
                Entry::Public(text) => self.take_public(text, now),
            }
            let log = self.log(origin);
            log.next = log.next.max(offset + 1);
        }
        self.trim(now);
    }

    /// It has been told everything that still counts up to these positions.
    pub fn advance(&mut self, positions: &Positions) {
        for (&origin, &next) in positions {
            if origin != self.origin {
                let log = self.log(origin);
                log.next = log.next.max(next);
            }
        }
    }

    fn log(&mut self, origin: u64) -> &mut Log {
        if self.others.len() >= MOST_LOGS && !self.others.contains_key(&origin) {
            let gone = self.others.iter().filter(|(o, _)| !self.live.contains(o));
            let least = gone.min_by_key(|(_, log)| log.len());
            if let Some(least) = least.map(|(&origin, _)| origin)
                && let Some(log) = self.others.remove(&least)
            {
                self.tokens -= log
                    .iter()
                    .map(|record| record.tokens().len())
                    .sum::<usize>();
            }
        }
        self.others.entry(origin).or_default()
    }

    fn take_text(&mut self, record: Arc<Record>, now: Instant) {
        let is_old = now.saturating_duration_since(record.made) >= self.config.ttl;
        let is_erased = |whose| self.erasures.cover(record.stamp, whose);
        if is_old || !record.is_answer() || record.whose.as_ref().is_none_or(is_erased) {
            return;
        }
        self.tokens += record.tokens().len();
        self.log(record.stamp.origin).push(record.clone());
        self.share(&record);
    }

    /// Whoever hears of an erasure says so in its own log: what it wrote before is void.
    fn take_erased(&mut self, erased: &Erased, now: Instant) {
        let age = now.saturating_duration_since(erased.made);
        if age >= self.config.ttl || !self.erasures.hear(erased) {
            return;
        }
        let stamp = self.stamp();
        self.own.next += 1;
        self.erasures.hear(&Erased { stamp, ..*erased });
        self.forget(&erased.whose, now);
    }

    fn take_public(&mut self, text: PublicText, now: Instant) {
        let length = text.tokens.as_ref().map_or(0, |tokens| tokens.len());
        // Routers that load at one time may overshoot their bound; one of another size may not.
        if self.public.tokens() + length <= self.most_tokens() / 4 * 3 {
            self.shelve(text, now);
        }
    }
}

#[cfg(test)]
mod tests;
