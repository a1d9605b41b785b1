//! Why the router does not start, and why a request is refused.

use std::{borrow::Cow, path::PathBuf, time::Duration};

use http::StatusCode;
use shoal_core::{Class, ParamError};
use shoal_fabric::{membership::EndpointError, net::NetError};
use shoal_text::{TemplateError, TextError};
use tonic::Code;

use crate::corpus::EraseError;

/// Why a router cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// A setting is outside its range.
    #[error("{setting} must be {expected}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// The range that holds.
        expected: &'static str,
    },
    /// An address of a worker or a router is none.
    #[error("workers, peers and addresses")]
    Endpoint(#[from] EndpointError),
    /// The file of API keys cannot be read.
    #[error("cannot read {}", path.display())]
    KeysFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file of API keys is no TOML of the expected shape.
    #[error("{}", path.display())]
    KeysSyntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// The file of API keys contradicts itself.
    #[error("{}: {problem}", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The listener or a channel.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The reflection service.
    #[error("gRPC reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The socket's address.
    #[error("the listener's address")]
    Address(#[source] std::io::Error),
}

impl RouterError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

/// Why a request is not answered, or not to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("{message}")]
    Invalid {
        code: &'static str,
        param: Option<Cow<'static, str>>,
        message: Cow<'static, str>,
    },
    #[error(transparent)]
    Param(#[from] ParamError),
    #[error("the prompt has {tokens} tokens and leaves no room in the context of {limit}")]
    ContextLength { tokens: usize, limit: u32 },
    #[error("{param} is not supported")]
    Unsupported { param: Cow<'static, str> },
    #[error("the prompt cannot be turned into tokens: {0}")]
    Text(#[from] TextError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the body is larger than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the prompt and its settings are larger than the {limit} bytes that a worker takes")]
    SubmissionTooLarge { limit: usize },
    #[error("no model {model:?} is served here")]
    ModelNotFound { model: String },
    #[error("there is no {method} {path}")]
    RouteNotFound { method: String, path: String },
    #[error("{path} does not take {method}")]
    MethodNotAllowed { method: String, path: String },
    #[error("a valid API key is needed: `Authorization: Bearer KEY`")]
    Unauthenticated,
    #[error("a key with `{0} = true` is needed")]
    Forbidden(&'static str),
    #[error("there is no group {group:?}")]
    GroupNotFound { group: String },
    #[error("group {group:?} cannot be told: {reason}")]
    GroupUnreachable { group: String, reason: String },
    #[error("group {group:?} was undrained meanwhile")]
    Undrained { group: String },
    #[error(transparent)]
    Erase(#[from] EraseError),
    #[error("the queue is full, or longer than the deadline allows")]
    QueueFull { retry_after: Duration },
    #[error("tenant {tenant:?} is over its quota of {what}")]
    Quota {
        tenant: String,
        what: &'static str,
        retry_after: Duration,
    },
    #[error("every worker's queue is full")]
    Overloaded { retry_after: Duration },
    #[error("no worker is ready")]
    NoWorker,
    #[error("the router is shutting down")]
    Draining,
    #[error("the request was lost with its worker {attempts} times without progress")]
    WorkerLost { attempts: u32 },
    #[error("the worker refused the request: {message}")]
    Refused { message: String },
    #[error("the deadline passed before the answer was complete")]
    Deadline,
}

/// Where a retry may help but nobody knows when.
const RETRY_SOON: Duration = Duration::from_secs(1);

impl RequestError {
    /// A wrong value of one field.
    pub(crate) fn invalid(
        param: impl Into<Cow<'static, str>>,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Invalid {
            code: "invalid_value",
            param: Some(param.into()),
            message: message.into(),
        }
    }

    /// What to do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::QueueFull { .. } | Self::Quota { .. } | Self::Overloaded { .. } => {
                Class::Backpressure
            }
            Self::NoWorker
            | Self::Draining
            | Self::WorkerLost { .. }
            | Self::GroupUnreachable { .. }
            | Self::Erase(EraseError::Unheard)
            | Self::Deadline => Class::Retry,
            _ => Class::Client,
        }
    }

    /// Stable machine-readable reason.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Invalid { code, .. } => code,
            Self::Param(_) => "invalid_value",
            Self::ContextLength { .. } => "context_length_exceeded",
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::Text(_) | Self::Template(_) => "invalid_prompt",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::SubmissionTooLarge { .. } => "request_too_large",
            Self::ModelNotFound { .. } => "model_not_found",
            Self::RouteNotFound { .. } => "unknown_url",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::Unauthenticated => "invalid_api_key",
            Self::Forbidden("admin") => "admin_key_needed",
            Self::Forbidden(_) => "router_key_needed",
            Self::GroupNotFound { .. } => "group_not_found",
            Self::GroupUnreachable { .. } => "group_unreachable",
            Self::Undrained { .. } => "group_undrained",
            Self::Erase(EraseError::Full(_)) => "too_many_erasures",
            Self::Erase(EraseError::Unheard) => "erasure_unheard",
            Self::QueueFull { .. } => "queue_full",
            Self::Quota { .. } => "rate_limit_exceeded",
            Self::Overloaded { .. } => "overloaded",
            Self::NoWorker => "no_ready_worker",
            Self::Draining => "draining",
            Self::WorkerLost { .. } => "worker_lost",
            Self::Refused { .. } => "invalid_request",
            Self::Deadline => "deadline_exceeded",
        }
    }

    /// The field at fault.
    pub(crate) fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::Param(error) => Some(error.param),
            Self::ContextLength { .. } | Self::Text(_) => Some("prompt"),
            Self::Template(_) => Some("messages"),
            Self::Unsupported { param } => Some(param),
            Self::ModelNotFound { .. } => Some("model"),
            Self::GroupNotFound { .. } => Some("group"),
            Self::Erase(EraseError::Full(_)) => Some("user"),
            _ => None,
        }
    }

    /// When a retry may succeed; `None` where it cannot help.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after }
            | Self::Quota { retry_after, .. }
            | Self::Overloaded { retry_after } => Some(*retry_after),
            Self::NoWorker | Self::Draining | Self::WorkerLost { .. } => Some(RETRY_SOON),
            _ => None,
        }
    }

    /// Over HTTP.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::BodyTooLarge { .. } | Self::SubmissionTooLarge { .. } => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            Self::ModelNotFound { .. }
            | Self::RouteNotFound { .. }
            | Self::GroupNotFound { .. } => StatusCode::NOT_FOUND,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Deadline => StatusCode::GATEWAY_TIMEOUT,
            _ => match self.class() {
                Class::Backpressure => StatusCode::TOO_MANY_REQUESTS,
                Class::Retry => StatusCode::SERVICE_UNAVAILABLE,
                Class::Client => StatusCode::BAD_REQUEST,
                Class::Fatal => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }

    /// Over gRPC.
    pub(crate) fn grpc_code(&self) -> Code {
        match self {
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::ModelNotFound { .. } | Self::GroupNotFound { .. } => Code::NotFound,
            Self::Undrained { .. } => Code::Aborted,
            Self::Forbidden(_) => Code::PermissionDenied,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Deadline => Code::DeadlineExceeded,
            _ => match self.class() {
                Class::Backpressure => Code::ResourceExhausted,
                Class::Retry => Code::Unavailable,
                Class::Client => Code::InvalidArgument,
                Class::Fatal => Code::Internal,
            },
        }
    }
}
