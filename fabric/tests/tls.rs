//! TLS files that are missing or wrong: every error names the file.

#![allow(clippy::unwrap_used)]

use std::fs;

use shoal_fabric::tls::TlsError;

mod certificates;
use certificates::Certificates;

#[test]
fn a_missing_file_is_named() {
    let files = Certificates::new();
    fs::remove_file(files.path("key.pem")).unwrap();
    let error = files.server(None).acceptor().map(drop).unwrap_err();
    assert!(matches!(&error, TlsError::Read { path, .. } if *path == files.path("key.pem")));
}

#[test]
fn a_file_without_pem_is_named() {
    let files = Certificates::new();
    fs::write(files.path("ca.pem"), "not a certificate").unwrap();
    for error in [
        files.server(Some(&files)).acceptor().map(drop).unwrap_err(),
        files.client(None).config().map(drop).unwrap_err(),
    ] {
        assert!(
            error
                .to_string()
                .contains("ca.pem: no valid PEM certificate"),
            "{error}"
        );
    }
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let (files, other) = (Certificates::new(), Certificates::new());
    fs::copy(other.path("key.pem"), files.path("key.pem")).unwrap();
    for error in [
        files.server(None).acceptor().map(drop).unwrap_err(),
        files.client(Some(&files)).config().map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, TlsError::KeyPair { .. }), "{error}");
    }
}

#[test]
fn half_an_identity_is_refused() {
    let files = Certificates::new();
    let mut client = files.client(Some(&files));
    client.key = None;
    let error = client.config().map(drop).unwrap_err();
    assert!(matches!(error, TlsError::HalfIdentity));
}
