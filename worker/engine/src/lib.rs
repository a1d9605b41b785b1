//! The inference engine of a worker: model, backends, KV pages, scheduler and sampler.
//! It knows no network and no async runtime: requests come in through a handle, and each
//! step's output goes out through a sink.

#![forbid(unsafe_code)]

pub mod backend;
pub mod request;
pub mod spec;
