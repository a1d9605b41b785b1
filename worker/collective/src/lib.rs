//! What the ranks of a tensor-parallel group say to one another within a step: the plan from
//! rank 0, parts of sums that every rank adds up in one order, logits to rank 0.
//!
//! Behind one trait: memory that processes of a machine share ([`shm`]), whose ranks
//! may as well be threads, and connections between machines ([`tcp`]). Linux only.

mod collective;
mod error;
pub mod fd;
mod pace;
pub mod shm;
pub mod tcp;
#[cfg(test)]
mod tests;

pub use collective::{Collective, MAX_RANKS, Parts};
pub use error::CollectiveError;
pub use pace::Pace;
