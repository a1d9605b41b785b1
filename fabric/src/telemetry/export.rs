//! Spans to an OTLP receiver.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_otlp::{SpanExporter, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracerProvider},
};
use tonic::transport::{ClientTlsConfig, Endpoint};

use super::TelemetryError;
use crate::sidecar::Sidecar;

/// For the last spans at the end of the process.
const FLUSH: Duration = Duration::from_secs(2);

/// Where spans go.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceConfig {
    /// URL of an OTLP receiver that speaks gRPC: `http://collector:4317`, or `https://…` with a
    /// certificate that the system trusts.
    pub endpoint: String,
    /// What this process is called there.
    pub service: String,
    /// The share of traces that are exported, of those that begin here: 0 to 1. A trace that
    /// begins elsewhere is exported where its beginning is.
    pub ratio: f64,
}

/// The running export. Dropping it sends what is left, within a short time.
#[derive(Debug)]
pub struct Exporter {
    provider: SdkTracerProvider,
    /// The connection is on it, so that the end of the process's own runtime loses nothing.
    _thread: Sidecar,
}

impl Exporter {
    pub(super) fn start(config: &TraceConfig) -> Result<Self, TelemetryError> {
        if !(0.0..=1.0).contains(&config.ratio) {
            return Err(TelemetryError::Ratio(config.ratio));
        }
        let wrong = |source| TelemetryError::Endpoint {
            endpoint: config.endpoint.clone(),
            source,
        };
        let mut endpoint = Endpoint::from_shared(config.endpoint.clone()).map_err(wrong)?;
        if config.endpoint.starts_with("https:") {
            let tls = ClientTlsConfig::new().with_enabled_roots();
            endpoint = endpoint.tls_config(tls).map_err(wrong)?;
        }
        let thread = Sidecar::start("telemetry").map_err(TelemetryError::Thread)?;
        let channel = {
            let _entered = thread.handle().enter();
            endpoint.connect_lazy()
        };
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .build()?;
        let resource = Resource::builder()
            .with_service_name(config.service.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let sampler = Sampler::TraceIdRatioBased(config.ratio);
        Ok(Self {
            provider: SdkTracerProvider::builder()
                .with_resource(resource)
                .with_sampler(Sampler::ParentBased(Box::new(sampler)))
                .with_batch_exporter(exporter)
                .build(),
            _thread: thread,
        })
    }

    pub(super) fn provider(&self) -> SdkTracerProvider {
        self.provider.clone()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::warn!(%error, "the last spans are lost");
        }
    }
}

/// Spans with ids that are exported nowhere. What a trace's beginning decided is passed on.
pub(super) fn silent() -> SdkTracerProvider {
    SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOff)))
        .build()
}
