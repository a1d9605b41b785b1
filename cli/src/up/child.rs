//! One process under supervision.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::control::{MAX_LINE, Order, Report, line};

/// What is waited for after the end of a process: what it wrote may be read late, and a process
/// of its own may hold the line open.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How to start a process.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    /// What log lines and messages call it.
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Whether its log lines get its name in front.
    pub(super) prefixed: bool,
}

/// What a process did.
pub(super) enum Next {
    Reported(Report),
    /// And there will be no more reports.
    Ended(ExitStatus),
}

/// A running process.
pub(super) struct Child {
    process: tokio::process::Child,
    orders: OwnedWriteHalf,
    reports: Reports,
    logs: JoinHandle<()>,
}

impl Child {
    /// Starts it in a process group of its own: a Ctrl-C in the terminal goes to the supervisor
    /// alone, which ends its processes in order.
    pub(super) fn spawn(launch: &Launch) -> io::Result<Self> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut process = Command::new(&launch.program)
            .args(&launch.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let (reports, orders) = UnixStream::from_std(ours)?.into_split();
        let prefix = launch.prefixed.then(|| format!("{} | ", launch.name));
        let stderr = process.stderr.take();
        let logs = tokio::spawn(async move {
            if let Some(stderr) = stderr {
                forward(stderr, prefix.as_deref().unwrap_or_default()).await;
            }
        });
        Ok(Self {
            process,
            orders,
            reports: Reports {
                stream: BufReader::new(reports),
                partial: Vec::new(),
                open: true,
            },
            logs,
        })
    }

    /// Gives it an order; one that is gone follows none.
    pub(super) async fn order(&mut self, order: &Order) {
        let written = match line(order) {
            Ok(line) => self.orders.write_all(&line).await,
            Err(e) => Err(e),
        };
        if let Err(error) = written {
            tracing::debug!(%error, "an order did not arrive");
        }
    }

    /// Waits for its next report, or for its end and its last log lines. Cancel-safe.
    pub(super) async fn next(&mut self) -> io::Result<Next> {
        let status = tokio::select! {
            biased;
            Some(report) = self.reports.next() => return Ok(Next::Reported(report)),
            status = self.process.wait() => status?,
        };
        // Its last words may still be on their way.
        if let Ok(Some(report)) = timeout(LAST_WORDS, self.reports.next()).await {
            return Ok(Next::Reported(report));
        }
        if !self.logs.is_finished() {
            // An error here is a panic of the task, which the panic hook has told.
            let _ = timeout(LAST_WORDS, &mut self.logs).await;
        }
        Ok(Next::Ended(status))
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        if let Err(error) = self.process.start_kill() {
            tracing::debug!(%error, "a process was gone before it was killed");
        }
    }
}

/// The reports of a process.
struct Reports {
    stream: BufReader<OwnedReadHalf>,
    /// What has come of the one under way.
    partial: Vec<u8>,
    open: bool,
}

impl Reports {
    /// `None` when there will be no more. Cancel-safe.
    async fn next(&mut self) -> Option<Report> {
        if !self.open {
            return None;
        }
        let room = MAX_LINE.saturating_sub(self.partial.len() as u64);
        let mut limited = (&mut self.stream).take(room);
        let read = limited.read_until(b'\n', &mut self.partial).await;
        self.open = read.is_ok() && self.partial.ends_with(b"\n");
        if !self.open {
            return None;
        }
        let report = serde_json::from_slice(&std::mem::take(&mut self.partial));
        self.open = report.is_ok();
        report.ok()
    }
}

/// Copies lines to standard error, each with `prefix`. Longer ones than [`MAX_LINE`] are split.
async fn forward(source: impl AsyncRead + Unpin, prefix: &str) {
    let mut source = BufReader::new(source);
    loop {
        let mut text = prefix.as_bytes().to_vec();
        let mut limited = (&mut source).take(MAX_LINE);
        match limited.read_until(b'\n', &mut text).await {
            Ok(n) if n > 0 => {}
            _ => return,
        }
        if !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        // One write a line, so that processes do not mix within lines. Without a standard
        // error there is nobody to tell.
        let _ = io::stderr().write_all(&text);
    }
}
