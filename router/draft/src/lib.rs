//! Text that drafts: where the last tokens of a sequence stood before, the token that followed
//! them then is a guess at the one that follows now. A guess costs speed when it is wrong, and
//! never a token, so every structure here may forget, collide and lag behind.

#![forbid(unsafe_code)]

mod census;
mod chains;
mod corpus;
mod ledger;
mod session;
mod store;

pub use chains::{LONGEST_MATCH, Match};
pub use corpus::Corpus;
pub use ledger::{Answer, Event, Ledger, LedgerConfig, Listed, Owner, PublicFull, Record};
pub use session::SessionIndex;
pub use store::{SharedCorpus, Store};
