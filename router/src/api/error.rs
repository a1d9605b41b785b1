//! Errors as the doors show them.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, header};
use prost::Message as _;
use serde::Serialize;
use shoal_core::Class;
use shoal_proto::inference::ErrorDetail;
use tonic::Status;
use tonic_types::pb;

use crate::error::RequestError;

/// OpenAI's error object.
#[derive(Debug, Serialize)]
pub(super) struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    message: String,
    r#type: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

impl<'a> From<&'a RequestError> for ErrorBody<'a> {
    fn from(error: &'a RequestError) -> Self {
        let kind = match (error, error.class()) {
            (RequestError::Unauthenticated, _) => "authentication_error",
            (_, Class::Client) => "invalid_request_error",
            (_, Class::Backpressure) => "rate_limit_error",
            (_, Class::Retry | Class::Fatal) => "server_error",
        };
        Self {
            error: ErrorObject {
                message: error.to_string(),
                r#type: kind,
                param: error.param(),
                code: error.code(),
            },
        }
    }
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let mut response = axum::Json(ErrorBody::from(&self)).into_response();
        *response.status_mut() = self.status();
        if let Some(time) = self.retry_after() {
            let seconds = time.as_secs_f64().ceil().max(1.0) as u64;
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::Unauthenticated) {
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Reason(self.code()));
        response
    }
}

/// Why a response is an error, for the metrics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reason(pub(super) &'static str);

/// With an [`ErrorDetail`] in a `google.rpc.Status`, as `grpc-status-details-bin` has it.
impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let detail = ErrorDetail {
            code: error.code().to_owned(),
            param: error.param().unwrap_or_default().to_owned(),
            retry_after: error.retry_after().map_or(0.0, |time| time.as_secs_f64()),
        };
        let code = error.grpc_code();
        let message = error.to_string();
        let details = pb::Status {
            code: code as i32,
            message: message.clone(),
            details: vec![prost_types::Any {
                type_url: "type.googleapis.com/shoal.inference.v1.ErrorDetail".to_owned(),
                value: detail.encode_to_vec(),
            }],
        };
        Self::with_details(code, message, details.encode_to_vec().into())
    }
}
