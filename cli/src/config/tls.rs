//! TLS files: a certificate and its key go together.

use std::path::PathBuf;

use shoal_fabric::tls::{ClientTls, ServerTls};

use super::ConfigError;

/// TLS of a listener, from the settings of `section`.
pub(super) fn server(
    section: &'static str,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
) -> Result<Option<ServerTls>, ConfigError> {
    match (cert, key) {
        (Some(cert), Some(key)) => Ok(Some(ServerTls {
            cert,
            key,
            client_ca,
        })),
        (None, None) if client_ca.is_none() => Ok(None),
        _ => Err(ConfigError::Incomplete {
            section,
            expected: "tls_cert and tls_key together, and both for tls_client_ca",
        }),
    }
}

/// TLS towards peers, from the settings of `section`.
pub(super) fn client(
    section: &'static str,
    expected: &'static str,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    domain: Option<String>,
) -> Result<Option<ClientTls>, ConfigError> {
    match (ca, cert.is_some() == key.is_some()) {
        (Some(ca), true) => Ok(Some(ClientTls {
            ca,
            cert,
            key,
            domain,
        })),
        (None, _) if cert.is_none() && key.is_none() && domain.is_none() => Ok(None),
        _ => Err(ConfigError::Incomplete { section, expected }),
    }
}
