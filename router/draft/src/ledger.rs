//! A router's books of text that drafts: what each user was answered, what may therefore be
//! shared with the other users of the tenant, and what is public. Workers follow its log.
//!
//! A run of tokens leaves its user's scope once as many users of the tenant as the settings ask
//! for were answered with the same run; of an answer, the longest stretches of such runs are
//! shared. What the caller marks as secret is never counted.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::{Class, DraftScope, TokenId};

use crate::census::{Census, MOST_USERS, RUN};
use crate::corpus::Corpus;

/// Bytes of a token in the log and the census, about.
const TOKEN_BYTES: usize = 32;
/// What a record costs beside its text, in tokens: an erasure has none.
const RECORD_COST: usize = 8;
/// Tokens of a record: longer texts are cut.
const RECORD_TOKENS: usize = 8192;
/// A tenant's shared text, in tokens.
const SHARED_TOKENS: usize = 1 << 18;

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

/// Whose text it is, and for which model.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Name of the model.
    pub model: Arc<str>,
    /// Name of the tenant.
    pub tenant: Arc<str>,
    /// What the tenant's users share.
    pub scope: DraftScope,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer<'a> {
    /// Whose it is.
    pub owner: Owner,
    /// The scope of the user.
    pub user: DraftScope,
    /// What was answered.
    pub tokens: &'a [TokenId],
    /// Stretches that are nobody else's business, ascending.
    pub secrets: Vec<Range<usize>>,
}

/// What happened to a scope.
#[derive(Clone, Debug)]
pub enum Event {
    /// It has new text.
    Text(Arc<[TokenId]>),
    /// Its text is gone.
    Erased,
}

/// An entry of the log.
#[derive(Clone, Debug)]
pub struct Record {
    /// Rises by one.
    pub offset: u64,
    /// Whose it is.
    pub owner: Owner,
    /// Where it drafts.
    pub scope: DraftScope,
    /// When it happened.
    pub made: Instant,
    /// What happened.
    pub event: Event,
    secrets: Vec<Range<usize>>,
}

/// A public text.
#[derive(Clone, Debug)]
struct Public {
    owner: Owner,
    tokens: Vec<TokenId>,
    /// When workers were told last.
    told: Instant,
}

/// A public text, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name, unique for its tenant and model.
    pub name: String,
    /// The model whose tokens it is in.
    pub model: Arc<str>,
    /// Its length.
    pub tokens: usize,
}

/// There is no room for a public text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the public texts of a router have at most {most} tokens together, of which {held} are taken"
)]
pub struct PublicFull {
    /// Tokens of the others.
    held: usize,
    /// Tokens of all.
    most: usize,
}

impl PublicFull {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Client
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct Ledger {
    config: LedgerConfig,
    log: VecDeque<Arc<Record>>,
    next: u64,
    /// Tokens in the log.
    tokens: usize,
    census: Census,
    /// What is shared already, by tenant.
    shared: HashMap<DraftScope, Corpus>,
    public: BTreeMap<(DraftScope, String), Public>,
}

impl Ledger {
    /// Empty books.
    pub fn new(config: LedgerConfig) -> Self {
        Self {
            config,
            log: VecDeque::new(),
            next: 0,
            tokens: 0,
            census: Census::new(config.bytes / TOKEN_BYTES, config.ttl, Instant::now()),
            shared: HashMap::new(),
            public: BTreeMap::new(),
        }
    }

    /// The offset of the next record.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The records from an offset on that a model's workers want, of about `most` tokens, and
    /// the offset after them.
    pub fn read(&self, from: u64, model: &str, most: usize) -> (Vec<Arc<Record>>, u64) {
        let first = self.next - self.log.len() as u64;
        let (mut at, mut tokens) = (from.clamp(first, self.next), 0);
        let mut records = Vec::new();
        while at < self.next && tokens < most {
            let record = &self.log[(at - first) as usize];
            at += 1;
            if *record.owner.model == *model {
                tokens += record.len() + 1;
                records.push(record.clone());
            }
        }
        (records, at)
    }

    /// Takes an answer in. It drafts for its user, and what of it others were told too for them.
    pub fn learn(&mut self, answer: Answer<'_>, now: Instant) {
        let event = Event::Text(answer.tokens.into());
        let record = self.append(answer.owner, answer.user, event, answer.secrets, now);
        self.share(&record, now);
        self.trim(now);
    }

    /// Loads a public text for a tenant, or replaces it.
    ///
    /// # Errors
    /// When the public texts would be more than half of what the log holds: it would lose them
    /// and be told of them without end.
    pub fn load(
        &mut self,
        owner: Owner,
        name: String,
        tokens: Vec<TokenId>,
        now: Instant,
    ) -> Result<(), PublicFull> {
        let key = (owner.scope, name);
        let others = self.public.iter().filter(|(known, _)| **known != key);
        let held: usize = others.map(|(_, text)| text.tokens.len()).sum();
        let most = self.most_tokens() / 2;
        if held + tokens.len() > most {
            return Err(PublicFull { held, most });
        }
        let replaced = self.public.remove(&key).is_some();
        let public = Public {
            owner: owner.clone(),
            tokens,
            told: now,
        };
        self.public.insert(key.clone(), public);
        if replaced {
            self.tell_public(&owner, now);
        } else {
            self.tell_one(&key, now);
        }
        self.trim(now);
        Ok(())
    }

    /// Drops a tenant's public text. False: there is none of that name.
    pub fn unload(&mut self, tenant: &str, name: &str, now: Instant) -> bool {
        let mut owners = Vec::new();
        self.public.retain(|(_, known), public| {
            let gone = known == name && *public.owner.tenant == *tenant;
            owners.extend(gone.then(|| public.owner.clone()));
            !gone
        });
        for owner in &owners {
            self.tell_public(owner, now);
        }
        !owners.is_empty()
    }

    /// A tenant's public texts.
    pub fn list(&self, tenant: &str) -> Vec<Listed> {
        let own = self
            .public
            .iter()
            .filter(|(_, p)| *p.owner.tenant == *tenant);
        own.map(|((_, name), public)| Listed {
            name: name.clone(),
            model: public.owner.model.clone(),
            tokens: public.tokens.len(),
        })
        .collect()
    }

    /// Forgets the answers to a user of a tenant, or to all of its users, and what is shared
    /// because of them. `owners` are scopes of the tenant that the log may have forgotten.
    pub fn erase(&mut self, owners: Vec<Owner>, user: Option<&str>, now: Instant) {
        let mut scopes: HashMap<DraftScope, Owner> = HashMap::new();
        let Some(tenant) = owners.first().map(|owner| owner.tenant.clone()) else {
            return;
        };
        let known = self.log.iter().map(|record| &record.owner);
        let known = known.filter(|owner| owner.tenant == tenant).cloned();
        for owner in owners.into_iter().chain(known) {
            scopes.insert(owner.scope, owner);
        }
        for owner in scopes.into_values() {
            let public = owner.scope.public();
            let gone: BTreeSet<DraftScope> = match user {
                Some(user) => [owner.scope.user(user), owner.scope].into(),
                None => {
                    let own = self
                        .log
                        .iter()
                        .filter(|record| record.owner.scope == owner.scope);
                    let own = own
                        .map(|record| record.scope)
                        .filter(|scope| *scope != public);
                    own.chain([owner.scope]).collect()
                }
            };
            self.shared.remove(&owner.scope);
            for record in &mut self.log {
                let text = matches!(record.event, Event::Text(_));
                if text && gone.contains(&record.scope) {
                    self.tokens -= record.len();
                    // The offsets of the others stay.
                    let mut emptied = (**record).clone();
                    emptied.event = Event::Text([].into());
                    *record = Arc::new(emptied);
                }
            }
            for scope in gone {
                self.append(owner.clone(), scope, Event::Erased, Vec::new(), now);
            }
        }
        self.recount(now);
        self.trim(now);
    }

    /// Counts the answers of the log anew.
    fn recount(&mut self, now: Instant) {
        self.census.clear();
        let records: Vec<_> = self.log.iter().cloned().collect();
        for record in records {
            let scope = record.owner.scope;
            if record.scope != scope && record.scope != scope.public() {
                self.share(&record, now);
            }
        }
    }

    /// Lets go what is too old or too much, and tells of public texts again in time.
    pub fn trim(&mut self, now: Instant) {
        self.census.turn(now);
        let most = self.most_tokens();
        while let Some(first) = self.log.front() {
            let age = now.saturating_duration_since(first.made);
            let fits = self.tokens <= most && self.log.len() <= most / RECORD_COST;
            if fits && age < self.config.ttl {
                break;
            }
            self.tokens -= first.len();
            self.log.pop_front();
        }
        if let Some(oldest) = now.checked_sub(self.config.ttl) {
            self.shared.retain(|_, corpus| {
                corpus.expire(oldest);
                !corpus.is_empty()
            });
        }
        let half = self.config.ttl / 2;
        self.retell(|told| now.saturating_duration_since(told) >= half, now);
    }

    /// Tells a follower that begins anew of every public text.
    pub fn retell_public(&mut self, now: Instant) {
        let first = self.log.front().map_or(now, |record| record.made);
        self.retell(|told| told < first, now);
    }

    /// Tells again of the public texts that were last told at such a time.
    fn retell(&mut self, is_due: impl Fn(Instant) -> bool, now: Instant) {
        let due = self.public.iter().filter(|(_, text)| is_due(text.told));
        let due: Vec<_> = due.map(|(key, _)| key.clone()).collect();
        for key in due {
            self.tell_one(&key, now);
        }
    }

    /// Of the log.
    fn most_tokens(&self) -> usize {
        self.config.bytes / TOKEN_BYTES
    }

    fn append(
        &mut self,
        owner: Owner,
        scope: DraftScope,
        event: Event,
        secrets: Vec<Range<usize>>,
        made: Instant,
    ) -> Arc<Record> {
        let record = Arc::new(Record {
            offset: self.next,
            owner,
            scope,
            made,
            event,
            secrets,
        });
        self.next += 1;
        self.tokens += record.len();
        self.log.push_back(record.clone());
        record
    }

    fn tell_one(&mut self, key: &(DraftScope, String), now: Instant) {
        let Some(public) = self.public.get_mut(key) else {
            return;
        };
        public.told = now;
        let owner = public.owner.clone();
        let pieces: Vec<Arc<[TokenId]>> =
            public.tokens.chunks(RECORD_TOKENS).map(Arc::from).collect();
        for piece in pieces {
            let scope = owner.scope.public();
            self.append(owner.clone(), scope, Event::Text(piece), Vec::new(), now);
        }
    }

    /// Tells of all public texts of a scope, and of nothing that was there before.
    fn tell_public(&mut self, owner: &Owner, now: Instant) {
        let scope = owner.scope.public();
        self.append(owner.clone(), scope, Event::Erased, Vec::new(), now);
        let own = self.public.keys().filter(|key| key.0 == owner.scope);
        let own: Vec<_> = own.cloned().collect();
        for key in own {
            self.tell_one(&key, now);
        }
    }

    /// Counts an answer's runs, and shares the stretches that enough users have in common and
    /// that are not shared yet.
    fn share(&mut self, record: &Record, now: Instant) {
        let Event::Text(tokens) = &record.event else {
            return;
        };
        let tenant = record.owner.scope;
        let [a, b, ..] = *record.scope.as_bytes();
        let user = u16::from_le_bytes([a, b]);
        let mut secrets = record.secrets.iter().peekable();
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
        for text in news {
            let corpus = self.shared.entry(tenant);
            let corpus = corpus.or_insert_with(|| Corpus::new(SHARED_TOKENS));
            corpus.push(&text, now);
            self.append(
                record.owner.clone(),
                tenant,
                Event::Text(text),
                Vec::new(),
                now,
            );
        }
    }

    /// The stretch, if it holds a run that is not shared yet.
    fn new_stretch(&self, tenant: &DraftScope, stretch: &[TokenId]) -> Option<Arc<[TokenId]>> {
        let shared = self.shared.get(tenant);
        let is_new = |run: &[TokenId]| !shared.is_some_and(|corpus| corpus.contains(run));
        stretch.windows(RUN).any(is_new).then(|| Arc::from(stretch))
    }
}

impl Record {
    fn len(&self) -> usize {
        match &self.event {
            Event::Text(tokens) => tokens.len(),
            Event::Erased => 0,
        }
    }
}

#[cfg(test)]
mod tests;
