//! A group whose ranks are on machines of their own. Rank 0 starts nobody: the others come to it,
//! come again when they or their connections were lost, and keep their weights while they wait.

mod house;
mod leader;
mod line;
mod rank;
mod status;

pub(super) use leader::Leader;
pub use rank::join_group;
