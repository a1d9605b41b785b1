//! What the tests of several crates share.

#![forbid(unsafe_code)]

pub mod accuracy;
pub mod backends;
pub mod conformance;
pub mod drive;
pub mod model;
pub mod naive;
