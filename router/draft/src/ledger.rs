//! A router's books of text that drafts: what each user of the cluster was answered, what may
//! therefore be shared with the other users of the tenant, and what is public. Workers follow
//! its log, and so do the other routers, whose logs it takes over.
//!
//! A run of tokens leaves its user's scope once as many users of the tenant as the settings ask
//! for were answered with the same run; of an answer, the longest stretches of such runs are
//! shared. What the caller marks as secret is never counted.

mod exchange;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::{Class, DraftScope, Subject, TokenId};

use crate::census::{Census, MOST_USERS, RUN};
use crate::corpus::Corpus;
use crate::erasures::Erasures;
use crate::log::Log;
use crate::public::{Change, Key, Listed, PublicFull, Shelf};
use crate::record::{Answer, Entry, Erased, Event, Owner, PublicText, Record, Stamp, Whose};

/// Bytes of a token in the log and the census, about.
const TOKEN_BYTES: usize = 32;
/// What a record costs beside its text, in tokens.
const RECORD_COST: usize = 8;
/// Tokens of a public text's piece.
const PIECE_TOKENS: usize = 8192;
/// A tenant's shared text, in tokens.
const SHARED_TOKENS: usize = 1 << 18;
/// Erasures of a tenant that are known at one time.
const MOST_ERASURES: usize = 4096;

/// How far somebody knows logs, by their origin: the first offset that is not known.
pub type Positions = BTreeMap<u64, u64>;

/// Settings of a [`Ledger`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerConfig {
    /// Users of a tenant who must have been answered with the same words before others of it
    /// are drafted for with them; 1 to [`MOST_USERS`](Self::MOST_USERS).
    pub users: usize,
    /// How long an answer counts and drafts.
    pub ttl: Duration,
    /// Bytes of answers and counts.
    pub bytes: usize,
}

impl LedgerConfig {
    /// Most users that can be asked for.
    pub const MOST_USERS: usize = MOST_USERS;
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            users: 3,
            ttl: Duration::from_secs(24 * 3600),
            bytes: 256 << 20,
        }
    }
}

/// More users of a tenant were forgotten than can be remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST_ERASURES} users of the tenant have been erased lately: erase all of them")]
pub struct ErasuresFull;

impl ErasuresFull {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Client
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct Ledger {
    config: LedgerConfig,
    /// Names its own log.
    origin: u64,
    own: Log,
    /// The answers of other routers, by origin; of routers that are gone, too.
    others: BTreeMap<u64, Log>,
    /// Other routers that tell the workers of their answers themselves.
    live: BTreeSet<u64>,
    /// Tokens in all logs.
    tokens: usize,
    census: Census,
    /// What is shared already, by tenant.
    shared: HashMap<DraftScope, Shared>,
    public: Shelf,
    erasures: Erasures,
}

#[derive(Debug)]
struct Shared {
    tenant: Subject,
    corpus: Corpus,
}

impl Ledger {
    /// Empty books, whose log has this name.
    pub fn new(config: LedgerConfig, origin: u64) -> Self {
        Self {
            config,
            origin,
            own: Log::default(),
            others: BTreeMap::new(),
            live: BTreeSet::new(),
            tokens: 0,
            census: Census::new(config.bytes / TOKEN_BYTES, config.ttl, Instant::now()),
            shared: HashMap::new(),
            public: Shelf::default(),
            erasures: Erasures::default(),
        }
    }

    /// The name of its log.
    pub fn origin(&self) -> u64 {
        self.origin
    }

    /// The offset of its log's next record.
    pub fn next(&self) -> u64 {
        self.own.next
    }

    /// What the workers of a model are to be told: its own log, and the answers of routers that
    /// cannot tell them any more, where that is its part. Of about `most` tokens, from
    /// `positions` on, which move behind it.
    pub fn read(&self, positions: &mut Positions, model: &str, most: usize) -> Vec<Entry> {
        let mut left = most;
        let wanted = |record: &Record| *record.owner.model == *model;
        let from = positions.get(&self.origin).copied().unwrap_or(0);
        let (records, next) = self.own.read(from, &mut left, wanted);
        let mut entries: Vec<_> = records.into_iter().map(Entry::Text).collect();
        let heard = self.erasures.heard_by(self.origin, from..next);
        entries.extend(heard.map(Entry::Erased));
        entries.sort_by_key(Entry::stamp);
        positions.insert(self.origin, next);
        for orphan in self.orphans() {
            let from = positions.get(&orphan).copied().unwrap_or(0);
            let (records, next) = self.others[&orphan].read(from, &mut left, wanted);
            entries.extend(records.into_iter().map(Entry::Text));
            positions.insert(orphan, next);
        }
        entries
    }

    /// The logs of routers that are gone and of which this one tells the workers: the first of
    /// those that are left does.
    pub fn orphans(&self) -> Vec<u64> {
        let orphans = self.others.keys().filter(|origin| self.tells(**origin));
        orphans.copied().collect()
    }

    /// These other routers tell the workers of their answers themselves.
    pub fn set_live(&mut self, live: BTreeSet<u64>, now: Instant) {
        self.live = live;
        self.retell_public(now);
    }

    /// Takes an answer in. It drafts for its user, and what of it others were told too for them.
    pub fn learn(&mut self, answer: Answer, now: Instant) {
        let record = Arc::new(Record {
            stamp: self.stamp(),
            owner: answer.owner,
            scope: answer.scope,
            whose: Some(answer.whose),
            made: now,
            event: Event::Answer {
                tokens: answer.tokens,
                secrets: answer.secrets,
            },
        });
        self.append(record.clone());
        self.share(&record);
        self.trim(now);
    }

    /// Loads a public text for a tenant, or replaces it.
    ///
    /// # Errors
    /// When the tenant's public texts would be more than a quarter of what the log holds, or all
    /// of them more than half: it would lose them and be told of them without end.
    pub fn load(
        &mut self,
        owner: Owner,
        name: String,
        tokens: Arc<[TokenId]>,
        now: Instant,
    ) -> Result<(), PublicFull> {
        let key = (owner.scope, name);
        self.public
            .check(&key, tokens.len(), self.most_tokens() / 2)?;
        self.publish(owner, key.1, Some(tokens), now);
        Ok(())
    }

    /// Drops a tenant's public text. False: there is none of that name.
    pub fn unload(&mut self, tenant: &str, name: &str, now: Instant) -> bool {
        let owners = self.public.owners(tenant, name);
        let is_there = !owners.is_empty();
        for owner in owners {
            self.publish(owner, name.to_owned(), None, now);
        }
        is_there
    }

    fn publish(
        &mut self,
        owner: Owner,
        name: String,
        tokens: Option<Arc<[TokenId]>>,
        now: Instant,
    ) {
        let key = (owner.scope, name);
        let version = self.public.next_version(&key);
        let stamp = self.stamp();
        let (_, name) = key;
        self.own.next += 1;
        self.shelve(
            PublicText {
                stamp,
                owner,
                name,
                version,
                tokens,
            },
            now,
        );
        self.trim(now);
    }

    /// A public text has come, from here or elsewhere.
    fn shelve(&mut self, text: PublicText, now: Instant) {
        let key = (text.owner.scope, text.name.clone());
        let (owner, is_mine) = (text.owner.clone(), self.tells(text.stamp.origin));
        match self.public.put(text) {
            // All say it again, so that whatever was told of the scope before is void.
            Some(Change::Replaced) => self.tell_public(&owner, now),
            Some(Change::New) if is_mine => self.tell_one(&key, now),
            Some(Change::New) | None => {}
        }
    }

    /// A tenant's public texts.
    pub fn list(&self, tenant: &str) -> Vec<Listed> {
        self.public.list(tenant)
    }

    /// Forgets the answers to a user of a tenant, or to all of its users, and what is shared
    /// because of them, here and at every router that hears of it. Gives the erasure's name.
    ///
    /// # Errors
    /// When more users were erased within the time that texts draft than can be remembered.
    pub fn erase(&mut self, whose: Whose, now: Instant) -> Result<Stamp, ErasuresFull> {
        // The last resort is always open.
        let room = MOST_ERASURES * if whose.user.is_some() { 1 } else { 2 };
        if self.erasures.count(&whose.tenant) >= room {
            return Err(ErasuresFull);
        }
        let id = self.stamp();
        self.own.next += 1;
        let erased = Erased {
            stamp: id,
            id,
            whose,
            made: now,
        };
        self.erasures.hear(&erased);
        self.forget(&whose, now);
        Ok(id)
    }

    /// Whether every live router has heard of an erasure.
    pub fn is_heard(&self, erasure: Stamp) -> bool {
        self.erasures.is_heard(erasure, &self.live)
    }

    /// Drops what an erasure takes, and counts the answers that are left anew.
    fn forget(&mut self, whose: &Whose, now: Instant) {
        let taken = |record: &Record| record.whose.is_some_and(|text| whose.takes(&text));
        for log in std::iter::once(&mut self.own).chain(self.others.values_mut()) {
            self.tokens -= log.retain(|record| !taken(record));
        }
        self.shared
            .retain(|_, shared| shared.tenant != whose.tenant);
        self.census.clear();
        let logs = std::iter::once(&self.own).chain(self.others.values());
        let mut records: Vec<_> = logs.flat_map(Log::iter).cloned().collect();
        // What is shared is as old as the answer that made it common.
        records.sort_by_key(|record| record.made);
        for record in records {
            self.share(&record);
        }
        self.trim(now);
    }

    /// Lets go what is too old or too much, and tells of public texts again in time.
    pub fn trim(&mut self, now: Instant) {
        self.census.turn(now);
        let most = self.most_tokens();
        loop {
            let logs = std::iter::once(&mut self.own).chain(self.others.values_mut());
            let count: usize = logs.map(|log| log.len()).sum();
            let logs = std::iter::once(&mut self.own).chain(self.others.values_mut());
            let oldest = logs
                .filter_map(|log| Some((log.front()?.made, log)))
                .min_by_key(|(made, _)| *made);
            let Some((made, log)) = oldest else { break };
            let age = now.saturating_duration_since(made);
            let fits = self.tokens <= most && count <= most / RECORD_COST;
            if fits && age < self.config.ttl {
                break;
            }
            let gone = log.pop_front();
            self.tokens -= gone.map_or(0, |record| record.tokens().len());
        }
        if let Some(oldest) = now.checked_sub(self.config.ttl) {
            self.shared.retain(|_, shared| {
                shared.corpus.expire(oldest);
                !shared.corpus.is_empty()
            });
        }
        self.erasures.expire(now, self.config.ttl);
        let half = self.config.ttl / 2;
        self.retell(
            |told| told.is_none_or(|told| now.saturating_duration_since(told) >= half),
            now,
        );
    }

    /// Tells a follower that begins anew of every public text.
    pub fn retell_public(&mut self, now: Instant) {
        let lost = self.own.lost;
        let is_lost = |told| lost.is_some_and(|lost| told <= lost);
        self.retell(|told| told.is_none_or(is_lost), now);
    }

    /// Tells again of the public texts that were last told at such a time.
    fn retell(&mut self, is_due: impl Fn(Option<Instant>) -> bool, now: Instant) {
        let due = self
            .public
            .due(|origin, told| self.tells(origin) && is_due(told));
        for key in due {
            self.tell_one(&key, now);
        }
    }

    /// Whether it is its part to tell the workers of what stands in a router's log.
    fn tells(&self, origin: u64) -> bool {
        let leads = self.live.iter().all(|live| self.origin < *live);
        origin == self.origin || leads && !self.live.contains(&origin)
    }

    /// Of all logs.
    fn most_tokens(&self) -> usize {
        self.config.bytes / TOKEN_BYTES
    }

    /// Where the next record of its own log stands.
    fn stamp(&self) -> Stamp {
        Stamp {
            origin: self.origin,
            offset: self.own.next,
        }
    }

    fn append(&mut self, record: Arc<Record>) {
        self.tokens += record.tokens().len();
        self.own.push(record);
    }

    fn tell(
        &mut self,
        owner: &Owner,
        scope: DraftScope,
        whose: Option<Whose>,
        event: Event,
        made: Instant,
    ) {
        let record = Arc::new(Record {
            stamp: self.stamp(),
            owner: owner.clone(),
            scope,
            whose,
            made,
            event,
        });
        self.append(record);
    }

    fn tell_one(&mut self, key: &Key, now: Instant) {
        let Some((owner, tokens)) = self.public.tell(key, now) else {
            return;
        };
        let scope = owner.scope.public();
        for piece in tokens.chunks(PIECE_TOKENS) {
            self.tell(&owner, scope, None, Event::Public(piece.into()), now);
        }
    }

    /// Tells of all public texts of a scope, and of nothing that was there before.
    fn tell_public(&mut self, owner: &Owner, now: Instant) {
        let scope = owner.scope.public();
        self.tell(owner, scope, None, Event::Cleared, now);
        for key in self.public.of(owner.scope) {
            self.tell_one(&key, now);
        }
    }

    /// Counts an answer's runs, and shares the stretches that enough users have in common and
    /// that are not shared yet: for as long as the answer itself drafts.
    fn share(&mut self, record: &Record) {
        let (Event::Answer { tokens, secrets }, Some(whose)) = (&record.event, record.whose) else {
            return;
        };
        let tenant = record.owner.scope;
        let [a, b, ..] = *record.scope.as_bytes();
        let user = u16::from_le_bytes([a, b]);
        let mut secrets = secrets.iter().peekable();
        // Tokens that belong to the stretch that ends here.
        let mut stretch = 0..0;
        let mut news = Vec::new();
        for (start, run) in tokens.windows(RUN).enumerate() {
            let end = start + RUN;
            while secrets.next_if(|secret| secret.end <= start).is_some() {}
            let secret = secrets.peek().is_some_and(|secret| secret.start < end);
            if secret || self.census.count(&tenant, run, user) < self.config.users {
                news.extend(self.new_stretch(&tenant, &tokens[stretch]));
                stretch = 0..0;
                continue;
            }
            stretch = if stretch.is_empty() {
                start..end
            } else {
                stretch.start..end
            };
        }
        news.extend(self.new_stretch(&tenant, &tokens[stretch]));
        let of_all = Whose {
            user: None,
            ..whose
        };
        for text in news {
            let shared = self.shared.entry(tenant).or_insert_with(|| Shared {
                tenant: whose.tenant,
                corpus: Corpus::new(SHARED_TOKENS),
            });
            shared.corpus.push(&text, record.made);
            let event = Event::Shared(text);
            self.tell(&record.owner, tenant, Some(of_all), event, record.made);
        }
    }

    /// The stretch, if it holds a run that is not shared yet.
    fn new_stretch(&self, tenant: &DraftScope, stretch: &[TokenId]) -> Option<Arc<[TokenId]>> {
        let shared = self.shared.get(tenant);
        let is_new = |run: &[TokenId]| !shared.is_some_and(|known| known.corpus.contains(run));
        stretch.windows(RUN).any(is_new).then(|| Arc::from(stretch))
    }
}

#[cfg(test)]
mod tests;
