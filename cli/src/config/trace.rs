//! `[trace]`: where traces go.

use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_fabric::telemetry::TraceConfig;

use super::Section;

/// Traces.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Traces")]
pub(crate) struct TraceSettings {
    /// OTLP receiver (gRPC) of router and worker spans, such as http://collector:4317
    #[arg(
        long = "otlp-endpoint",
        global = true,
        env = "OTEL_EXPORTER_OTLP_ENDPOINT",
        value_name = "URL"
    )]
    pub(crate) endpoint: Option<String>,

    /// Share of the traces that begin here which is exported, 0 to 1 [default: 1]
    #[arg(
        long = "trace-ratio",
        global = true,
        env = "SHOAL_TRACE_RATIO",
        value_name = "SHARE"
    )]
    pub(crate) ratio: Option<f64>,

    /// Name of this process in traces [default: shoal-router, shoal-worker]
    #[arg(
        long = "trace-service",
        global = true,
        env = "OTEL_SERVICE_NAME",
        value_name = "NAME"
    )]
    pub(crate) service: Option<String>,
}

impl Section for TraceSettings {
    const NAME: &'static str = "trace";
}

impl TraceSettings {
    /// The configuration of a process that is called `service` unless it is set; `None` without
    /// a receiver.
    pub(crate) fn config(self, service: &str) -> Option<TraceConfig> {
        Some(TraceConfig {
            endpoint: self.endpoint.filter(|endpoint| !endpoint.is_empty())?,
            service: self.service.unwrap_or_else(|| service.to_owned()),
            ratio: self.ratio.unwrap_or(1.0),
        })
    }

    /// The flags that give another process these settings.
    pub(super) fn arguments(&self) -> Vec<String> {
        let ratio = self.ratio.map(|ratio| ratio.to_string());
        let flags = [
            ("--otlp-endpoint", &self.endpoint),
            ("--trace-ratio", &ratio),
            ("--trace-service", &self.service),
        ];
        let given = flags.into_iter().filter_map(|(flag, value)| {
            let value = value.clone()?;
            Some([flag.to_owned(), value])
        });
        given.flatten().collect()
    }
}
