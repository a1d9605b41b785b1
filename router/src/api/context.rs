//! What surrounds every request: its id, its span, its caller, its count.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequestParts, Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts};
use shoal_fabric::telemetry;
use tokio::time::Instant;
use tracing::{Instrument, field::Empty, info_span};

use super::account;
use crate::{
    error::RequestError,
    keys::{Caller, Tenant},
    request::Arrival,
    service::Service,
};

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const LONGEST_REQUEST_ID: usize = 128;

/// What the doors need to know of a request besides its message.
#[derive(Clone, Debug)]
pub(super) struct Context {
    request_id: Arc<str>,
    caller: Option<Caller>,
    at: Instant,
}

impl Context {
    /// Takes the id over that the request itself brings.
    pub(super) fn rename(&mut self, id: &str) -> Result<(), RequestError> {
        if !is_fit(id) {
            return Err(RequestError::invalid(
                "request_id",
                format!(
                    "request_id must be at most {LONGEST_REQUEST_ID} characters of graphic ASCII"
                ),
            ));
        }
        self.request_id = id.into();
        Ok(())
    }

    /// The request's arrival, with the deadline that the client or this router sets.
    pub(super) fn arrival(
        self,
        timeout: Option<Duration>,
        service: &Service,
    ) -> Result<Arrival, RequestError> {
        let longest = service.request_timeout;
        Ok(Arrival {
            caller: self.caller.ok_or(RequestError::Unauthenticated)?,
            request_id: self.request_id,
            at: self.at,
            deadline: self.at + timeout.map_or(longest, |t| t.min(longest)),
        })
    }

    /// Whether the caller may see and change the cluster.
    pub(super) fn authorize_operator(&self) -> Result<(), RequestError> {
        match &self.caller {
            Some(caller) if caller.operator => Ok(()),
            Some(_) => Err(RequestError::Forbidden("admin")),
            None => Err(RequestError::Unauthenticated),
        }
    }

    /// Whether the caller is another router of the cluster.
    pub(super) fn authorize_router(&self) -> Result<(), RequestError> {
        match &self.caller {
            Some(caller) if caller.router => Ok(()),
            Some(_) => Err(RequestError::Forbidden("router")),
            None => Err(RequestError::Unauthenticated),
        }
    }

    /// The caller's tenant.
    pub(super) fn tenant(self) -> Result<Arc<Tenant>, RequestError> {
        let caller = self.caller.ok_or(RequestError::Unauthenticated)?;
        Ok(caller.tenant)
    }

    /// Whether the caller is known.
    pub(super) fn authorize(&self) -> Result<(), RequestError> {
        match self.caller {
            Some(_) => Ok(()),
            None => Err(RequestError::Unauthenticated),
        }
    }
}

/// The context of a request with valid credentials.
#[derive(Debug)]
pub(super) struct Authorized(pub(super) Context);

impl FromRequestParts<Arc<Service>> for Authorized {
    type Rejection = RequestError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Service>) -> Result<Self, RequestError> {
        let context = parts.extensions.remove::<Context>();
        let context = context.ok_or(RequestError::Unauthenticated)?;
        context.authorize()?;
        Ok(Self(context))
    }
}

/// Gives the request its context and counts its answer.
pub(super) async fn surround(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Response {
    let request_id = request_id(request.headers());
    let authorization = request.headers().get(header::AUTHORIZATION);
    let caller = service.caller(authorization.map(HeaderValue::as_bytes));
    let tenant = caller.as_ref().map(|caller| caller.tenant.name.clone());
    let user = caller.as_ref().map(|caller| caller.user.clone());
    let route = account::route(&request);
    let span = info_span!(
        "request",
        otel.kind = "server",
        route,
        request_id = &*request_id,
        tenant = tenant.as_deref(),
        user = user.as_deref().filter(|user| !user.is_empty()),
        model = Empty,
        seed = Empty,
        trace_id = Empty,
    );
    telemetry::set_parent_from_headers(&span, request.headers());
    // From a log line to the trace.
    if let Some(id) = telemetry::trace_id(&span) {
        span.record("trace_id", id);
    }
    request.extensions_mut().insert(Context {
        request_id: request_id.clone(),
        caller,
        at: Instant::now(),
    });
    let mut response = next.run(request).instrument(span.clone()).await;
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID.clone(), id);
    }
    account::count(&service.metrics, &span, route, response)
}

/// Whether an id is fit for logs and headers.
fn is_fit(id: &str) -> bool {
    (1..=LONGEST_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// The client's id where it is fit, else a new one.
fn request_id(headers: &HeaderMap) -> Arc<str> {
    let given = headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    match given.filter(|id| is_fit(id)) {
        Some(id) => id.into(),
        None => format!("{:032x}", rand::random::<u128>()).into(),
    }
}
