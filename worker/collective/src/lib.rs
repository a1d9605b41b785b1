//! What the ranks of a tensor-parallel group say to one another within a step: the plan from
//! rank 0, parts of sums that every rank adds up in one order, logits to rank 0.
//!
//! Behind one trait: memory that processes of a machine share ([`shm`]), whose ranks
//! may as well be threads. Linux only.

mod collective;
mod error;
pub mod fd;
pub mod shm;

pub use collective::{Collective, MAX_RANKS, Parts};
pub use error::CollectiveError;
