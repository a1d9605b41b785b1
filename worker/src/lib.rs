//! A worker: loads one model, runs the engine, and serves `shoal.worker.v1`, health probes
//! and metrics on one port. It speaks token ids only.

#![forbid(unsafe_code)]

mod bulk;
mod compute;
mod config;
mod corpus;
mod epoch;
mod error;
mod group;
mod load;
mod member;
mod memory;
mod metrics;
mod outbox;
mod pages;
mod probes;
mod run;
mod service;
mod session;
mod sessions;
mod wire;
mod worker;

#[cfg(test)]
mod tests;

pub use compute::CoreTime;
pub use config::{
    BackendKind, ConfigError, GroupConfig, Others, RankConfig, RemoteConfig, WorkerConfig,
    WorkerRole, parse_isa, parse_kv_type, parse_payload, parse_prompts,
};
pub use error::WorkerError;
pub use group::{GroupError, RankCommand, Watch, join_group, run_rank};
pub use load::{LoadError, Loaded};
pub use run::{run, run_driven, run_with};
pub use shoal_collective::tcp::Payload;
