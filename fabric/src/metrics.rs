//! Prometheus metrics of a process.

use std::sync::{Arc, PoisonError, RwLock};

use axum::{Router, http::header, routing::get};
use prometheus_client::{metrics::histogram::Histogram, registry};

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of a process; clones are the same registry. Every name gets the prefix
/// `shoal_`.
#[derive(Clone, Debug)]
pub struct Registry(Arc<RwLock<registry::Registry>>);

impl Default for Registry {
    fn default() -> Self {
        let registry = registry::Registry::with_prefix("shoal");
        Self(Arc::new(RwLock::new(registry)))
    }
}

impl Registry {
    /// Adds metrics, at any time of the process's life.
    pub fn register(&self, add: impl FnOnce(&mut registry::Registry)) {
        add(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// All metrics in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let registry = self.0.read().unwrap_or_else(PoisonError::into_inner);
        // Writing to a string fails for a collector's own failure alone, which ends the text
        // before its `# EOF`, so the scraper sees it.
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &registry) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }

    /// The route `/metrics`.
    pub fn routes(&self) -> Router {
        let registry = self.clone();
        let metrics = async move || ([(header::CONTENT_TYPE, CONTENT_TYPE)], registry.render());
        Router::new().route("/metrics", get(metrics))
    }
}

/// A histogram of durations that a client feels: 1 ms to 2 minutes, in seconds.
pub fn latency_histogram() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        120.0,
    ])
}

/// A histogram of durations inside the engine: 100 µs to 2.5 s, in seconds.
pub fn step_histogram() -> Histogram {
    Histogram::new([
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1,
        0.25, 0.5, 1.0, 2.5,
    ])
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn metrics_appear_under_the_prefix() {
        let registry = Registry::default();
        let (tokens, latency): (Counter, _) = (Counter::default(), latency_histogram());
        registry.register(|r| {
            r.register("tokens", "Tokens", tokens.clone());
            r.register("latency_seconds", "Latency", latency.clone());
        });
        tokens.inc_by(3);
        latency.observe(0.002);
        let text = registry.render();
        assert!(text.contains("shoal_tokens_total 3\n"), "{text}");
        let bucket = "shoal_latency_seconds_bucket{le=\"0.0025\"} 1\n";
        assert!(text.contains(bucket), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
