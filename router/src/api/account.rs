//! Counts the requests and their answers.

use std::{collections::HashSet, sync::LazyLock};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    response::Response,
};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use prometheus_client::metrics::{counter::Counter, family::Family};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use shoal_proto::DESCRIPTORS;
use tonic::Code;
use tracing::Span;

use super::error::Reason;
use crate::metrics::{Metrics, Outcome, RequestLabels};

/// The paths of the gRPC methods: no label may be whatever a client asks for.
static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
    let mut methods = HashSet::new();
    for file in &set.file {
        for service in &file.service {
            let path = format!("/{}.{}/", file.package(), service.name());
            methods.extend(service.method.iter().map(|m| path.clone() + m.name()));
        }
    }
    methods
});

/// The request's route: its pattern, or the gRPC method.
pub(super) fn route(request: &Request) -> String {
    let path = request.uri().path();
    match request.extensions().get::<MatchedPath>() {
        None => "none".to_owned(),
        Some(_) if METHODS.contains(path) => path.to_owned(),
        Some(pattern) => pattern.as_str().to_owned(),
    }
}

/// Counts the answer: an HTTP one by its status, a gRPC one when it ends, by the code that
/// comes last.
pub(super) fn count(metrics: &Metrics, span: &Span, route: String, response: Response) -> Response {
    let status = response.status().as_u16();
    if let Some(Reason(reason)) = response.extensions().get() {
        metrics.rejected(reason);
        tracing::info!(parent: span, status, reason, "refused");
    }
    let mut call = Call {
        requests: metrics.requests.clone(),
        labels: RequestLabels {
            route,
            code: Outcome::Http(status),
        },
    };
    let kind = response.headers().get(header::CONTENT_TYPE);
    if !kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return response;
    }
    if let Some(code) = grpc_code(response.headers()) {
        call.ends(code);
        return response;
    }
    // Until its end comes: a client that leaves takes the rest away.
    call.ends(Code::Cancelled);
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            if let Some(code) = frame.trailers_ref().and_then(grpc_code) {
                call.ends(code);
            }
            frame
        }))
    })
}

fn grpc_code(headers: &HeaderMap) -> Option<Code> {
    let status = headers.get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}

/// A request that counts when it is dropped.
struct Call {
    requests: Family<RequestLabels, Counter>,
    labels: RequestLabels,
}

impl Call {
    fn ends(&mut self, code: Code) {
        self.labels.code = Outcome::Grpc(code);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.requests.get_or_create(&self.labels).inc();
    }
}
