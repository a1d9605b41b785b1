//! A router over real sockets, before scripted workers.

// Helpers are outside of test functions, where clippy does not know them for tests.
#![allow(clippy::unwrap_used)]

mod bundle;
mod corpus;
mod disconnect;
mod errors;
mod failover;
mod grpc;
mod health;
mod lead;
mod limits;
mod mock;
mod openai;
mod operate;
mod peers;
mod stream;
mod support;
