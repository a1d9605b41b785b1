//! The trace context of spans, over process borders and back in time.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use opentelemetry::{
    global,
    propagation::{Extractor, TextMapPropagator},
    trace::{Span as _, TraceContextExt, Tracer},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

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

/// The id of the trace that `span` is exported in, in hex; `None` where it is not.
pub fn trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_sampled().then(|| context.trace_id().to_string())
}

/// Gives `span` children that are over: `phases` one after the other from `start` on, and
/// `last` from their end until now.
pub fn phases(
    span: &Span,
    start: SystemTime,
    phases: &[(&'static str, Duration)],
    last: &'static str,
) {
    let parent = span.context();
    if !parent.span().span_context().is_sampled() {
        return;
    }
    let tracer = global::tracer("shoal");
    let child = |name, from, to| {
        let builder = tracer.span_builder(name).with_start_time(from);
        let mut child = builder.start_with_context(&tracer, &parent);
        child.end_with_timestamp(to);
    };
    let mut from = start;
    for &(name, time) in phases {
        let to = from + time;
        child(name, from, to);
        from = to;
    }
    child(last, from, SystemTime::now().max(from));
}

#[cfg(test)]
mod tests {
    use tracing::info_span;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn traced(test: impl FnOnce()) {
        let provider = crate::telemetry::export::silent();
        let subscriber = tracing_subscriber::registry().with(crate::telemetry::spans(&provider));
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
    fn only_exported_spans_tell_their_trace() {
        traced(|| {
            let span = info_span!("alone");
            assert_eq!(trace_id(&span), None);
            let span = info_span!("child");
            set_parent_str(&span, PARENT);
            assert_eq!(trace_id(&span).as_deref(), Some(ids(PARENT).0));
            let span = info_span!("child");
            set_parent_str(&span, &PARENT.replace("-01", "-00"));
            assert_eq!(trace_id(&span), None);
        });
    }
}
