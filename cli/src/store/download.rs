//! HTTP downloads: verified while they stream, put in place in one step.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use shoal_core::Class;
use tempfile::NamedTempFile;
use ureq::Agent;
use ureq::http::{Response, header};
use ureq::tls::{RootCerts, TlsConfig};

use super::progress::Progress;

/// Longest page of a package index that is read.
const MAX_PAGE: u64 = 16 << 20;
const BUFFER: usize = 128 << 10;

/// Why a file could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DownloadError {
    #[error("cannot reach {url}; is this machine offline?")]
    Unreachable { url: String, source: ureq::Error },
    #[error("{url} was not found (HTTP 404)")]
    NotFound { url: String },
    #[error("{url} needs credentials (HTTP {status})")]
    Denied { url: String, status: u16 },
    #[error("{url} answered HTTP {status}")]
    Status { url: String, status: u16 },
    #[error("the request for {url} failed")]
    Request { url: String, source: ureq::Error },
    #[error("the download of {url} broke off after {got} bytes")]
    Broken {
        url: String,
        got: u64,
        source: io::Error,
    },
    #[error("{what} has SHA-256 {got}, not the expected {expected}")]
    HashMismatch {
        what: String,
        expected: String,
        got: String,
    },
    #[error("no space left on the disk of {path}")]
    DiskFull { path: PathBuf, source: io::Error },
    #[error("cannot write below {path}")]
    Write { path: PathBuf, source: io::Error },
}

impl DownloadError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Unreachable { .. } | Self::Request { .. } | Self::Broken { .. } => Class::Retry,
            Self::Status { status, .. } if *status == 429 || *status >= 500 => Class::Retry,
            Self::NotFound { .. } | Self::Denied { .. } | Self::Status { .. } => Class::Client,
            Self::HashMismatch { .. } | Self::DiskFull { .. } | Self::Write { .. } => Class::Fatal,
        }
    }
}

/// An HTTP client that trusts the system's certificate authorities (`SSL_CERT_FILE` and
/// `SSL_CERT_DIR` included) and uses the proxies that the environment names.
pub(crate) struct Client {
    agent: Agent,
}

impl Client {
    pub(crate) fn new() -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects_will_error(false)
            .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build();
        Self {
            agent: config.into(),
        }
    }

    /// The text at `url`, and the address that answered after all redirects.
    pub(crate) fn text(&self, url: &str, accept: &str) -> Result<(String, String), DownloadError> {
        use ureq::ResponseExt;
        let request = self.agent.get(url).header(header::ACCEPT, accept);
        let mut response = checked(url, request.call())?;
        let from = response.get_uri().to_string();
        let body = response.body_mut().with_config().limit(MAX_PAGE);
        let text = body.read_to_string().map_err(|e| failed(url, e))?;
        Ok((text, from))
    }

    /// The answer to `url` itself: a redirect is returned, not followed.
    pub(crate) fn head(
        &self,
        url: &str,
        bearer: Option<&str>,
    ) -> Result<Response<ureq::Body>, DownloadError> {
        let mut request = self.agent.head(url).config().max_redirects(0).build();
        if let Some(token) = bearer {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        checked(url, request.call())
    }

    /// Streams `url` into a temporary file in `dir` and checks it against `expected`
    /// (SHA-256 in hex) where that is given.
    pub(crate) fn fetch(
        &self,
        url: &str,
        bearer: Option<&str>,
        dir: &Path,
        expected: Option<&str>,
        progress: &Progress,
    ) -> Result<NamedTempFile, DownloadError> {
        let mut request = self.agent.get(url);
        if let Some(token) = bearer {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = checked(url, request.call())?;
        let length = response.body().content_length();
        progress.begin(length);
        let mut body = response.into_body();
        let reader = body.with_config().limit(u64::MAX).reader();
        let mut source = Source { inner: reader, url };
        write_verified(&mut source, url, dir, expected, length, progress)
    }
}

/// A failing read of the source must not look like a failing write of the target.
struct Source<'a, R> {
    inner: R,
    url: &'a str,
}

impl<R: Read> Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8], got: u64) -> Result<usize, DownloadError> {
        loop {
            match self.inner.read(buffer) {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(DownloadError::Broken {
                        url: self.url.to_owned(),
                        got,
                        source,
                    });
                }
            }
        }
    }
}

fn write_verified<R: Read>(
    source: &mut Source<'_, R>,
    what: &str,
    dir: &Path,
    expected: Option<&str>,
    length: Option<u64>,
    progress: &Progress,
) -> Result<NamedTempFile, DownloadError> {
    let mut file = NamedTempFile::new_in(dir).map_err(|e| unwritable(dir, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    let mut got = 0;
    loop {
        let n = source.read(&mut buffer, got)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        let written = file.write_all(&buffer[..n]);
        written.map_err(|e| unwritable(dir, e))?;
        got += n as u64;
        progress.advance(n as u64);
    }
    if let Some(length) = length.filter(|&length| got < length) {
        return Err(DownloadError::Broken {
            url: what.to_owned(),
            got,
            source: io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{length} bytes were announced"),
            ),
        });
    }
    let digest = hex(&hash.finalize());
    match expected {
        Some(expected) if !digest.eq_ignore_ascii_case(expected) => {
            Err(DownloadError::HashMismatch {
                what: what.to_owned(),
                expected: expected.to_owned(),
                got: digest,
            })
        }
        _ => Ok(file),
    }
}

/// Copies `source` (named `what` in errors) into a temporary file in `dir` and checks its SHA-256.
pub(crate) fn copy_verified(
    source: impl Read,
    what: &str,
    dir: &Path,
    expected: &str,
    progress: &Progress,
) -> Result<NamedTempFile, DownloadError> {
    let mut source = Source {
        inner: source,
        url: what,
    };
    write_verified(&mut source, what, dir, Some(expected), None, progress)
}

/// Makes the finished `file` appear as `path` in one step.
pub(crate) fn persist(file: NamedTempFile, path: &Path) -> Result<(), DownloadError> {
    file.as_file().sync_all().map_err(|e| unwritable(path, e))?;
    share(file.as_file()).map_err(|e| unwritable(path, e))?;
    file.persist(path)
        .map(drop)
        .map_err(|e| unwritable(path, e.error))
}

/// Temporary files are private to their owner; a cached model may be read by everyone.
fn share(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(PermissionsExt::from_mode(0o644))
}

/// The typed error for a failed write below `path`.
pub(crate) fn unwritable(path: &Path, source: io::Error) -> DownloadError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            DownloadError::DiskFull { path, source }
        }
        _ => DownloadError::Write { path, source },
    }
}

fn checked(
    url: &str,
    result: Result<Response<ureq::Body>, ureq::Error>,
) -> Result<Response<ureq::Body>, DownloadError> {
    let response = result.map_err(|e| failed(url, e))?;
    let url = url.to_owned();
    match response.status().as_u16() {
        200..=399 => Ok(response),
        404 | 410 => Err(DownloadError::NotFound { url }),
        status @ (401 | 403) => Err(DownloadError::Denied { url, status }),
        status => Err(DownloadError::Status { url, status }),
    }
}

fn failed(url: &str, source: ureq::Error) -> DownloadError {
    let url = url.to_owned();
    match source {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Timeout(_)
        | ureq::Error::Io(_) => DownloadError::Unreachable { url, source },
        _ => DownloadError::Request { url, source },
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
