//! The front door of a Shoal cluster: OpenAI's HTTP API and gRPC `shoal.inference.v1` on one
//! port, and behind both one request path — credentials, queue, text, placement, a worker's
//! session, and back. See `docs/architecture.md`.

#![forbid(unsafe_code)]

mod admission;
mod answer;
mod api;
mod breaker;
mod cluster;
mod config;
mod corpus;
mod dispatch;
mod drain;
mod error;
mod generation;
mod keys;
mod lead;
mod link;
mod merge;
mod metrics;
mod model;
mod output;
mod pages;
mod peers;
mod place;
mod placement;
mod request;
mod retry;
mod server;
mod service;
mod session;
mod status;
#[cfg(test)]
mod testing;
mod watchdog;
mod worker;

pub use config::{RouterArgs, RouterConfig};
pub use error::RouterError;
pub use keys::ApiKeys;
pub use placement::{Routing, RoutingError};
pub use server::{Server, run};
pub use shoal_draft::LedgerConfig;
