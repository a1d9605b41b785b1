//! What the logs of routers are made of.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use shoal_core::{DraftScope, Subject, TokenId};

/// A place in a router's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Names the log: drawn at the router's start.
    pub origin: u64,
    /// Rises with every record of the log.
    pub offset: u64,
}

/// Whose text it is, and for which model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Name of the model.
    pub model: Arc<str>,
    /// Name of the tenant.
    pub tenant: Arc<str>,
    /// What the tenant's users share.
    pub scope: DraftScope,
}

/// Who may have a text forgotten, or has had texts forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Whose {
    /// The tenant.
    pub tenant: Subject,
    /// One user of it; of a text without, every user had a part in it, and an erasure without
    /// is of all users.
    pub user: Option<Subject>,
}

impl Whose {
    /// Whether an erasure for this one takes a text of that one.
    pub fn takes(&self, text: &Self) -> bool {
        let one = self.user.zip(text.user);
        self.tenant == text.tenant && one.is_none_or(|(erased, user)| erased == user)
    }
}

/// An answer, as it is taken in.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The model and the tenant.
    pub owner: Owner,
    /// The scope of the user.
    pub scope: DraftScope,
    /// The user.
    pub whose: Whose,
    /// What was answered.
    pub tokens: Arc<[TokenId]>,
    /// Stretches that are nobody else's business, ascending.
    pub secrets: Vec<Range<usize>>,
}

/// What a record has to tell of a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A user was answered with this.
    Answer {
        /// The text.
        tokens: Arc<[TokenId]>,
        /// Stretches of it that are nobody else's business, ascending.
        secrets: Vec<Range<usize>>,
    },
    /// Enough users of the tenant were answered with this.
    Shared(Arc<[TokenId]>),
    /// A piece of a public text.
    Public(Arc<[TokenId]>),
    /// The public texts so far are void.
    Cleared,
}

/// A text in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it stands.
    pub stamp: Stamp,
    /// The model and the tenant.
    pub owner: Owner,
    /// Where it drafts.
    pub scope: DraftScope,
    /// Nobody can have a public text forgotten.
    pub whose: Option<Whose>,
    /// When the text was made.
    pub made: Instant,
    /// What there is to tell.
    pub event: Event,
}

impl Record {
    /// The text; none where it is only told that there is none.
    pub fn tokens(&self) -> &[TokenId] {
        match &self.event {
            Event::Answer { tokens, .. } | Event::Shared(tokens) | Event::Public(tokens) => tokens,
            Event::Cleared => &[],
        }
    }

    /// Whether other routers take it over: what follows from answers, they find by themselves.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(self.event, Event::Answer { .. })
    }
}

/// That a router has heard of an erasure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Erased {
    /// Who has heard of it, and since when.
    pub stamp: Stamp,
    /// The erasure's name: who heard of it first, and where.
    pub id: Stamp,
    /// Who is forgotten.
    pub whose: Whose,
    /// When it was asked for.
    pub made: Instant,
}

/// A public text, or the end of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicText {
    /// Where it was loaded or dropped.
    pub stamp: Stamp,
    /// The model and the tenant.
    pub owner: Owner,
    /// Unique for its tenant and model.
    pub name: String,
    /// Rises with each load and drop of the name; of equal ones the greater stamp wins.
    pub version: u64,
    /// Absent once it is dropped.
    pub tokens: Option<Arc<[TokenId]>>,
}

/// An entry of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Text that drafts.
    Text(Arc<Record>),
    /// An erasure was heard of.
    Erased(Erased),
    /// A public text was loaded or dropped.
    Public(PublicText),
}

impl Entry {
    /// Where it stands.
    pub fn stamp(&self) -> Stamp {
        match self {
            Self::Text(record) => record.stamp,
            Self::Erased(erased) => erased.stamp,
            Self::Public(text) => text.stamp,
        }
    }
}
