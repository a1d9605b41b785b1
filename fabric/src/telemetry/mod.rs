//! Logs, traces, and the W3C trace context that follows a request from process to process.
//!
//! Spans of Shoal's own crates carry OpenTelemetry trace ids whatever the log filter is and
//! whether or not they are exported, so a trace never breaks at a quiet process.

mod context;
mod export;

pub use context::{phases, set_parent_from_headers, set_parent_str, trace_id, traceparent};
pub use export::{Exporter, TraceConfig};

use std::{io::IsTerminal, str::FromStr};

use opentelemetry::{global, trace::TracerProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use shoal_core::Class;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt, registry::LookupSpan,
    util::SubscriberInitExt,
};

/// How logs look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(TelemetryError::Format { given: s.into() }),
        }
    }
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// The format.
    pub format: LogFormat,
    /// Directives of `tracing_subscriber::EnvFilter`: `info`, `info,shoal_worker=debug`.
    pub filter: String,
}

/// Logs that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// Not a log format.
    #[error("the log format is human or json, not {given:?}")]
    Format {
        /// What was given.
        given: String,
    },
    /// Not a filter.
    #[error("log filter {filter:?}")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Not an address of an OTLP receiver.
    #[error("{endpoint:?} is no address of an OTLP receiver")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// Not a share of traces.
    #[error("the share of traces is between 0 and 1, not {0}")]
    Ratio(f64),
    /// Traces cannot be exported.
    #[error("the export of traces cannot be set up")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// The operating system gave no thread.
    #[error("cannot start the telemetry thread")]
    Thread(#[source] std::io::Error),
    /// The process has a subscriber already.
    #[error("logs are set up twice")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

impl TelemetryError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

/// Sends logs to standard error, and spans to an OTLP receiver where `traces` names one. Once
/// per process. What the process exports must live as long as it does: the last spans are
/// sent when it is dropped.
///
/// # Errors
/// When a setting is wrong, or on a second call.
pub fn init(
    logs: &LogConfig,
    traces: Option<&TraceConfig>,
) -> Result<Option<Exporter>, TelemetryError> {
    let filter = EnvFilter::try_new(&logs.filter).map_err(|source| TelemetryError::Filter {
        filter: logs.filter.clone(),
        source,
    })?;
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match logs.format {
        LogFormat::Human => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let exporter = traces.map(Exporter::start).transpose()?;
    let provider = match &exporter {
        Some(exporter) => exporter.provider(),
        None => export::silent(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(spans(&provider))
        .try_init()?;
    global::set_tracer_provider(provider);
    Ok(exporter)
}

/// Makes spans of Shoal's crates spans of OpenTelemetry.
fn spans<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let ours = |m: &Metadata<'_>| {
        m.is_span() && *m.level() <= Level::INFO && m.target().starts_with("shoal")
    };
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("shoal"))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(filter_fn(ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_parse() {
        assert_eq!("json".parse::<LogFormat>().unwrap(), LogFormat::Json);
        let error = "xml".parse::<LogFormat>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the log format is human or json, not \"xml\""
        );
    }
}
