//! A real etcd on free ports, and etcdctl to disturb it.

use std::{
    net::TcpListener,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use shoal_fabric::{
    membership::{Etcd, EtcdConfig},
    net::Network,
};
use tempfile::TempDir;

use crate::certificates::Certificates;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Server {
    dir: TempDir,
    certificates: Option<Certificates>,
    process: Option<Child>,
    client: u16,
    peer: u16,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(None)
    }

    /// Over TLS, where there are certificates: both sides show them.
    pub(crate) fn with(certificates: Option<Certificates>) -> Self {
        let ports = [free_port(), free_port()];
        let mut server = Self {
            dir: TempDir::new().unwrap(),
            certificates,
            process: None,
            client: ports[0],
            peer: ports[1],
        };
        server.run();
        server
    }

    /// Starts it, on the data it had.
    pub(crate) fn run(&mut self) {
        let client = self.url();
        let peer = format!("http://127.0.0.1:{}", self.peer);
        let mut command = Command::new("etcd");
        if let Some(certificates) = &self.certificates {
            let path = |name| certificates.path(name);
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(path("ca.pem"));
            command.arg("--cert-file").arg(path("cert.pem"));
            command.arg("--key-file").arg(path("key.pem"));
        }
        let process = command
            .args(["--name", "default", "--data-dir"])
            .arg(self.dir.path().join("data"))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: etcd-server)");
        self.process = Some(process);
        let end = Instant::now() + PATIENCE;
        while !self.ctl(&["endpoint", "health"]).status.success() {
            assert!(Instant::now() < end, "etcd did not come up");
        }
    }

    /// Takes it away at once, as a crash does. Its data stays.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// `etcdctl`, whatever its result.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3");
        command.args(["--endpoints", &self.url()]);
        if let Some(certificates) = &self.certificates {
            let path = |name| certificates.path(name);
            command.arg("--cacert").arg(path("ca.pem"));
            command.arg("--cert").arg(path("cert.pem"));
            command.arg("--key").arg(path("key.pem"));
        }
        command
            .args(arguments)
            .output()
            .expect("etcdctl is installed (Debian: etcd-client)")
    }

    /// `etcdctl`, which must succeed; what it prints.
    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![format!("127.0.0.1:{}", self.client).parse().unwrap()],
            network: Network::Tcp,
            cluster: "test".into(),
            login: None,
            tls: self.certificates.as_ref().map(|c| c.client(Some(c))),
            ttl: Duration::from_secs(2),
        }
    }

    fn url(&self) -> String {
        let scheme = match self.certificates {
            None => "http",
            Some(_) => "https",
        };
        format!("{scheme}://127.0.0.1:{}", self.client)
    }

    /// One process's membership.
    pub(crate) fn member(&self) -> Etcd {
        Etcd::start(self.config()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
