//! The inference engine of a worker: model, backends, KV pages, scheduler and sampler.
//! It knows no network and no async runtime: requests come in through a handle, and each
//! step's output goes out through a sink.

#![forbid(unsafe_code)]

pub mod backend;
pub mod candle;
pub mod config;
pub mod cpu;
pub mod digest;
pub mod engine;
mod kv;
mod line;
pub mod metrics;
pub mod request;
pub mod sampler;
mod scheduler;
mod sequence;
pub mod spec;
pub mod speculation;
mod step;
pub mod weights;

#[cfg(test)]
mod tests;
