//! What every Shoal process needs around its own work: an orderly end, a listener that
//! serves HTTP and gRPC on one port, channels to its peers, TLS, logs and traces, metrics,
//! and the membership of the cluster.

#![forbid(unsafe_code)]

pub mod backoff;
pub mod membership;
pub mod metrics;
pub mod net;
pub mod shutdown;
mod sidecar;
pub mod telemetry;
pub mod tls;
