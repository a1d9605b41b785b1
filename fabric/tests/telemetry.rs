//! Spans that arrive at a real OTLP receiver.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use shoal_fabric::telemetry::{self, LogConfig, LogFormat, TraceConfig};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use tracing::info_span;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

struct Receiver(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_and_their_phases_arrive() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut received) = mpsc::unbounded_channel();
    let service = TraceServiceServer::new(Receiver(sender));
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let logs = LogConfig {
        format: LogFormat::Json,
        // Traces do not hang on what is logged.
        filter: "error".into(),
    };
    let traces = TraceConfig {
        endpoint,
        service: "shoal-test".into(),
        ratio: 1.0,
    };
    let exporter = telemetry::init(&logs, Some(&traces)).unwrap();
    let start = SystemTime::now() - Duration::from_secs(3);
    {
        let span = info_span!(target: "shoal_test", "sequence", answer = 42);
        telemetry::set_parent_str(&span, PARENT);
        assert_eq!(telemetry::trace_id(&span).as_deref(), Some(&PARENT[3..35]));
        let (queue, prefill) = (Duration::from_secs(1), Duration::from_millis(500));
        telemetry::phases(
            &span,
            start,
            &[("queue", queue), ("prefill", prefill)],
            "decode",
        );
        let unsampled = info_span!(target: "shoal_test", "unsampled");
        telemetry::set_parent_str(&unsampled, &PARENT.replace("-01", "-00"));
        drop(info_span!(target: "elsewhere", "foreign"));
    }
    // The rest is sent at the end.
    tokio::task::spawn_blocking(move || drop(exporter))
        .await
        .unwrap();

    let mut spans = HashMap::<String, Span>::new();
    while let Ok(request) = received.try_recv() {
        for resource in request.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            let name = attributes.iter().find(|a| a.key == "service.name").unwrap();
            assert!(format!("{name:?}").contains("shoal-test"));
            let found = resource.scope_spans.into_iter().flat_map(|s| s.spans);
            spans.extend(found.map(|span| (span.name.clone(), span)));
        }
    }
    let mut names: Vec<&str> = spans.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["decode", "prefill", "queue", "sequence"]);

    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let sequence = &spans["sequence"];
    assert_eq!(hex(&sequence.trace_id), PARENT[3..35]);
    assert_eq!(hex(&sequence.parent_span_id), PARENT[36..52]);
    assert!(sequence.attributes.iter().any(|a| a.key == "answer"));
    for phase in ["queue", "prefill", "decode"] {
        assert_eq!(spans[phase].trace_id, sequence.trace_id, "{phase}");
        assert_eq!(spans[phase].parent_span_id, sequence.span_id, "{phase}");
    }
    let length = |name: &str| spans[name].end_time_unix_nano - spans[name].start_time_unix_nano;
    assert_eq!(length("queue"), 1_000_000_000);
    assert_eq!(length("prefill"), 500_000_000);
    assert_eq!(
        spans["queue"].end_time_unix_nano,
        spans["prefill"].start_time_unix_nano
    );
    assert_eq!(
        spans["prefill"].end_time_unix_nano,
        spans["decode"].start_time_unix_nano
    );
    assert!(length("decode") >= 1_500_000_000);
}
