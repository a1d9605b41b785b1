//! A router as a process.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{Result, http::Exchange};

/// Clock ticks per second of `/proc` (USER_HZ, 100 on Linux).
const TICKS: f64 = 100.0;
const PAGE: f64 = 4096.0;

/// A running router; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) address: SocketAddr,
    process: Child,
}

impl Drop for Router {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Router {
    /// `shoal router` in front of these workers, ready.
    pub(crate) async fn start(
        shoal: &Path,
        workers: impl Iterator<Item = SocketAddr>,
        flags: &[&str],
    ) -> Result<Self> {
        let address = free_address()?;
        let workers: Vec<String> = workers.map(|w| w.to_string()).collect();
        let mut command = Command::new(shoal);
        command
            .args(["router", "--listen", &address.to_string()])
            .args(["--workers", &workers.join(","), "--log", "warn"])
            .args(flags)
            .stdin(Stdio::null());
        let router = Self::of(command, address)?;
        let url = "/metrics";
        let ready = format!(
            "shoal_worker_ready{{worker=\"{}\"}} 1",
            workers[workers.len() - 1]
        );
        router.until(url, &ready).await?;
        Ok(router)
    }

    /// Any process that listens there.
    pub(crate) fn of(mut command: Command, address: SocketAddr) -> Result<Self> {
        let process = command.spawn()?;
        Ok(Self { address, process })
    }

    /// Waits until a GET gives `text`.
    pub(crate) async fn until(&self, path: &str, text: &str) -> Result<()> {
        for _ in 0..600 {
            if let Ok(mut exchange) = Exchange::get(self.address, path).await {
                // A server that is not up yet may break off.
                let _ = exchange.finish().await;
                if exchange.has(text) {
                    return Ok(());
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(format!("{path} never gave {text}").into())
    }

    /// Seconds of CPU time so far.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let stat = self.stat("stat")?;
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks = |i: usize| -> Result<f64> { Ok(fields.get(i).ok_or("no field")?.parse()?) };
        Ok((ticks(11)? + ticks(12)?) / TICKS)
    }

    /// Resident memory, in MiB.
    pub(crate) fn memory(&self) -> Result<f64> {
        let statm = self.stat("statm")?;
        let pages: f64 = statm.split_whitespace().nth(1).ok_or("no field")?.parse()?;
        Ok(pages * PAGE / f64::from(1 << 20))
    }

    fn stat(&self, file: &str) -> Result<String> {
        Ok(fs::read_to_string(format!(
            "/proc/{}/{file}",
            self.process.id()
        ))?)
    }
}

/// An address that was free a moment ago.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
