//! Logs, and the W3C trace context that follows a request from process to process.
//!
//! Spans of Shoal's own crates carry OpenTelemetry trace ids whatever the log filter is, so
//! a trace never breaks at a quiet process.

use std::{collections::HashMap, io::IsTerminal, str::FromStr};

use http::HeaderMap;
use opentelemetry::{
    propagation::{Extractor, TextMapPropagator},
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SdkTracerProvider};
use shoal_core::Class;
use tracing::{Level, Metadata, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt, registry::LookupSpan,
    util::SubscriberInitExt,
};

const TRACEPARENT: &str = "traceparent";

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

/// Sends logs to standard error and gives spans their trace ids. Once per process.
///
/// # Errors
/// When the filter does not parse, or on a second call.
pub fn init(config: &LogConfig) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(&config.filter).map_err(|source| TelemetryError::Filter {
        filter: config.filter.clone(),
        source,
    })?;
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match config.format {
        LogFormat::Human => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(trace_ids())
        .try_init()?;
    Ok(())
}

/// Gives spans of Shoal's crates trace ids. Nothing is exported.
fn trace_ids<S>() -> impl Layer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let tracer = SdkTracerProvider::builder().build().tracer("shoal");
    let ours = |m: &Metadata<'_>| {
        m.is_span() && *m.level() <= Level::INFO && m.target().starts_with("shoal")
    };
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_filter(filter_fn(ours))
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

/// Makes `span` a child of the trace context in the headers, if there is a valid one. Before
/// the span is entered.
pub fn set_parent_from_headers(span: &Span, headers: &HeaderMap) {
    set_parent(span, &Headers(headers));
}

/// Makes `span` a child of a `traceparent`, if it is a valid one. Before the span is entered.
pub fn set_parent_str(span: &Span, traceparent: &str) {
    set_parent(
        span,
        &HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]),
    );
}

fn set_parent(span: &Span, carrier: &dyn Extractor) {
    let parent = TraceContextPropagator::new().extract(carrier);
    if parent.span().span_context().is_valid()
        && let Err(error) = span.set_parent(parent)
    {
        tracing::debug!(%error, "span without its parent");
    }
}

/// The W3C `traceparent` that makes others children of `span`. `None` where the span is
/// disabled.
pub fn traceparent(span: &Span) -> Option<String> {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT)
}

#[cfg(test)]
mod tests {
    use tracing::info_span;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn traced(test: impl FnOnce()) {
        let subscriber = tracing_subscriber::registry().with(trace_ids());
        tracing::subscriber::with_default(subscriber, test);
    }

    /// Trace id and span id.
    fn ids(traceparent: &str) -> (&str, &str) {
        let parts: Vec<&str> = traceparent.split('-').collect();
        (parts[1], parts[2])
    }

    #[test]
    fn a_span_has_a_trace_id_of_its_own() {
        traced(|| {
            let (a, b) = (info_span!("a"), info_span!("b"));
            let (a, b) = (traceparent(&a).unwrap(), traceparent(&b).unwrap());
            assert_ne!(ids(&a).0, ids(&b).0);
            assert_ne!(ids(&a).0, "0".repeat(32));
        });
    }

    #[test]
    fn a_parent_gives_its_trace_id() {
        traced(|| {
            let span = info_span!("child");
            set_parent_str(&span, PARENT);
            let child = traceparent(&span).unwrap();
            assert_eq!(ids(&child).0, ids(PARENT).0);
            assert_ne!(ids(&child).1, ids(PARENT).1);

            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, child.parse().unwrap());
            let span = info_span!("grandchild");
            set_parent_from_headers(&span, &headers);
            assert_eq!(ids(&traceparent(&span).unwrap()).0, ids(PARENT).0);
        });
    }

    #[test]
    fn a_broken_parent_starts_a_new_trace() {
        traced(|| {
            for broken in [
                "",
                "00-zz",
                "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            ] {
                let span = info_span!("child");
                set_parent_str(&span, broken);
                assert_ne!(ids(&traceparent(&span).unwrap()).0, "0".repeat(32));
            }
        });
    }

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
