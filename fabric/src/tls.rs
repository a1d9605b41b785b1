//! TLS by rustls: certificates from PEM files, mutual authentication where a client CA is
//! given.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    server::{VerifierBuilderError, WebPkiClientVerifier},
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use shoal_core::Class;
use tokio_rustls::TlsAcceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// What a listener shows, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// PEM file: the certificate and its chain, leaf first.
    pub cert: PathBuf,
    /// PEM file: the private key of the leaf.
    pub key: PathBuf,
    /// PEM file: whoever connects must show a certificate of one of these authorities.
    pub client_ca: Option<PathBuf>,
}

/// Whom a channel trusts, and what it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM file: the authorities of the servers.
    pub ca: PathBuf,
    /// PEM file: the certificate to show, with `key`.
    pub cert: Option<PathBuf>,
    /// PEM file: the private key of `cert`.
    pub key: Option<PathBuf>,
    /// The name to expect in the server's certificate; absent is the host dialled.
    pub domain: Option<String>,
}

/// TLS that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no PEM, or does not hold what it should.
    #[error("{}: no valid PEM {what}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why.
        source: pem::Error,
    },
    /// The key is unusable or not the certificate's.
    #[error("{} with {}", cert.display(), key.display())]
    KeyPair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// A certificate of the file is no authority.
    #[error("{}: not a certificate authority", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The authorities of the file cannot verify clients.
    #[error("{}: cannot verify clients", path.display())]
    ClientVerifier {
        /// The file.
        path: PathBuf,
        /// Why.
        source: VerifierBuilderError,
    },
    /// This build's cryptography lacks the protocol versions.
    #[error("TLS versions")]
    Versions(#[source] rustls::Error),
    /// A certificate without a key, or a key without a certificate.
    #[error("a client certificate and its key go together")]
    HalfIdentity,
}

impl TlsError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

impl ServerTls {
    /// Loads the files. Offers HTTP/2 and HTTP/1.1 (ALPN).
    ///
    /// # Errors
    /// When a file is missing or wrong; the error names it.
    pub fn acceptor(&self) -> Result<TlsAcceptor, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Versions)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|source| TlsError::ClientVerifier {
                        path: path.clone(),
                        source,
                    })?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(certificates(&self.cert)?, private_key(&self.key)?)
            .map_err(|source| key_pair(&self.cert, &self.key, source))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl ClientTls {
    /// Loads the files for a channel.
    ///
    /// # Errors
    /// When a file is missing or wrong; the error names it.
    pub fn config(&self) -> Result<ClientTlsConfig, TlsError> {
        // Parsed here for an error that names the file; tonic takes the PEM text.
        authorities(&self.ca)?;
        let mut config =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&self.ca)?));
        match (&self.cert, &self.key) {
            (None, None) => {}
            (Some(cert), Some(key)) => {
                check_key_pair(cert, key)?;
                config = config.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            _ => return Err(TlsError::HalfIdentity),
        }
        if let Some(domain) = &self.domain {
            config = config.domain_name(domain);
        }
        Ok(config)
    }
}

fn check_key_pair(cert: &Path, key: &Path) -> Result<(), TlsError> {
    let provider: CryptoProvider = ring::default_provider();
    rustls::sign::CertifiedKey::from_der(certificates(cert)?, private_key(key)?, &provider)
        .map(drop)
        .map_err(|source| key_pair(cert, key, source))
}

fn key_pair(cert: &Path, key: &Path, source: rustls::Error) -> TlsError {
    TlsError::KeyPair {
        cert: cert.into(),
        key: key.into(),
        source,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.into(),
        source,
    })
}

/// At least one certificate.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    certificates
        .and_then(|list| {
            if list.is_empty() {
                Err(pem::Error::NoItemsFound)
            } else {
                Ok(list)
            }
        })
        .map_err(|source| TlsError::Pem {
            path: path.into(),
            what: "certificate",
            source,
        })
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|source| TlsError::Pem {
        path: path.into(),
        what: "private key",
        source,
    })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Authority {
                path: path.into(),
                source,
            })?;
    }
    Ok(roots)
}
