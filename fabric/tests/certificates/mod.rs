//! An authority of its own and one certificate that it signed, as PEM files.

use std::{fs, path::PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use shoal_fabric::tls::{ClientTls, ServerTls};
use tempfile::TempDir;

pub(crate) struct Certificates {
    pub(crate) directory: TempDir,
}

impl Certificates {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        let cert = params.signed_by(&key, &ca).unwrap();
        for (name, pem) in [
            ("ca.pem", ca.pem()),
            ("cert.pem", cert.pem()),
            ("key.pem", key.serialize_pem()),
        ] {
            fs::write(directory.path().join(name), pem).unwrap();
        }
        Self { directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A server with this certificate, which trusts clients of `clients`.
    pub(crate) fn server(&self, clients: Option<&Self>) -> ServerTls {
        ServerTls {
            cert: self.path("cert.pem"),
            key: self.path("key.pem"),
            client_ca: clients.map(|c| c.path("ca.pem")),
        }
    }

    /// A client that trusts this authority, and shows the certificate of `identity`.
    pub(crate) fn client(&self, identity: Option<&Self>) -> ClientTls {
        ClientTls {
            ca: self.path("ca.pem"),
            cert: identity.map(|c| c.path("cert.pem")),
            key: identity.map(|c| c.path("key.pem")),
            domain: None,
        }
    }
}
