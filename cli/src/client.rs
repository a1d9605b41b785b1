//! The gRPC client side, shared by `chat` and `bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use shoal_core::Class;
use tonic::metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};

/// Where a router is, and as whom to ask it.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClientArgs {
    /// Address of the router
    #[arg(
        long,
        env = "SHOAL_URL",
        value_name = "URL",
        default_value = "http://127.0.0.1:8080"
    )]
    pub(crate) url: String,

    /// Key to authenticate with
    #[arg(
        long,
        env = "SHOAL_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub(crate) api_key: Option<String>,

    /// Certificate authority (PEM) to trust instead of the system's
    #[arg(long, env = "SHOAL_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
}

/// Why a router cannot be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("{url:?} is no address of a router")]
    Address {
        url: String,
        source: tonic::transport::Error,
    },
    #[error("the API key holds characters that a header cannot carry")]
    Key(#[source] InvalidMetadataValue),
    #[error("cannot read {path}")]
    Ca {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot connect to {url}; is the router running (shoal up)?")]
    Connect {
        url: String,
        source: tonic::transport::Error,
    },
}

impl ClientError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Address { .. } | Self::Key(_) | Self::Ca { .. } => Class::Client,
            Self::Connect { .. } => Class::Retry,
        }
    }
}

/// What the user should do about an answer that is a failure.
pub(crate) fn status_class(status: &Status) -> Class {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Aborted => Class::Retry,
        Code::ResourceExhausted => Class::Backpressure,
        Code::Internal | Code::Unknown | Code::DataLoss => Class::Fatal,
        _ => Class::Client,
    }
}

/// Puts the API key on every request.
#[derive(Clone, Debug)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl ClientArgs {
    /// A connected channel that carries the key.
    pub(crate) async fn connect(&self) -> Result<InterceptedService<Channel, Bearer>, ClientError> {
        let key = match &self.api_key {
            Some(key) => {
                let mut value: MetadataValue<Ascii> =
                    format!("Bearer {key}").parse().map_err(ClientError::Key)?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let connect = |source| ClientError::Connect {
            url: self.url.clone(),
            source,
        };
        let mut endpoint = Endpoint::from_shared(self.url.clone())
            .map_err(|source| ClientError::Address {
                url: self.url.clone(),
                source,
            })?
            .connect_timeout(Duration::from_secs(10))
            .tcp_nodelay(true);
        if self.url.starts_with("https:") {
            let tls = match &self.ca {
                Some(path) => {
                    let pem = std::fs::read(path).map_err(|source| ClientError::Ca {
                        path: path.clone(),
                        source,
                    })?;
                    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))
                }
                None => ClientTlsConfig::new().with_enabled_roots(),
            };
            endpoint = endpoint.tls_config(tls).map_err(connect)?;
        }
        let channel = endpoint.connect().await.map_err(connect)?;
        Ok(InterceptedService::new(channel, Bearer(key)))
    }
}
