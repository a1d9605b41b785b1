//! Text that drafts: where the last tokens of a sequence stood before, the token that followed
//! them then is a guess at the one that follows now. A guess costs speed when it is wrong, and
//! never a token, so every structure here may forget, collide and lag behind. Erasures alone are
//! never missed.

#![forbid(unsafe_code)]

mod census;
mod chains;
mod corpus;
mod erasures;
mod ledger;
mod log;
mod public;
mod record;
mod session;
mod store;

pub use chains::{LONGEST_MATCH, Match};
pub use corpus::Corpus;
pub use erasures::Erasures;
pub use ledger::{ErasuresFull, Ledger, LedgerConfig, Positions};
pub use public::{Listed, PublicFull};
pub use record::{Answer, Entry, Erased, Event, Owner, PublicText, Record, Stamp, Whose};
pub use session::SessionIndex;
pub use store::{SharedCorpus, Store};
