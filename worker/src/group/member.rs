//! Another rank, as rank 0 sees it: a process, and the line to it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use super::line::{Order, Part, Report, receive, send};
use super::{GroupError, Watch};

/// Reports that may wait for rank 0; a rank makes one.
const REPORTS: usize = 4;

/// What a rank's process may take to read an order: it computes, but one fits its buffer.
const WRITE: Duration = Duration::from_secs(1);

/// Between looks whether the wait for a report is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// How to start a rank's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankCommand {
    /// The program.
    pub program: std::path::PathBuf,
    /// Its arguments, with which it runs [`run_rank`](crate::run_rank).
    pub arguments: Vec<String>,
}

/// A rank's process. It is killed with this.
pub(super) struct Member {
    pub(super) rank: usize,
    /// It has not reported yet.
    pub(super) fresh: bool,
    process: Child,
    line: UnixStream,
    reports: Receiver<Report>,
}

impl Member {
    /// Starts it, and its loading. `watch` is told of its end.
    pub(super) fn start(
        command: &RankCommand,
        part: Part,
        watch: Arc<Watch>,
    ) -> Result<Self, GroupError> {
        let rank = part.rank;
        let start = |source| GroupError::Start { rank, source };
        let (line, theirs) = UnixStream::pair().map_err(start)?;
        line.set_write_timeout(Some(WRITE)).map_err(start)?;
        // In a process group of its own: a Ctrl-C in the terminal is for rank 0, which needs its
        // ranks while it drains.
        let process = Command::new(&command.program)
            .args(&command.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(start)?;
        let (sender, reports) = sync_channel(REPORTS);
        let member = Self {
            rank,
            fresh: true,
            process,
            line: line.try_clone().map_err(start)?,
            reports,
        };
        std::thread::Builder::new()
            .name(format!("rank-{rank}"))
            .spawn(move || {
                listen(&line, &sender);
                drop(sender);
                tracing::warn!(rank, "a rank has ended");
                watch.deaths.send_modify(|deaths| *deaths += 1);
            })
            .map_err(start)?;
        member.order(&Order::Load(part), None)?;
        Ok(member)
    }

    /// Gives it an order.
    pub(super) fn order(
        &self,
        order: &Order,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), GroupError> {
        let rank = self.rank;
        send(&self.line, order, file).map_err(|source| GroupError::Start { rank, source })
    }

    /// Waits until it has loaded; its numerics id.
    pub(super) fn loaded(
        &self,
        until: Instant,
        wanted: impl Fn() -> bool,
    ) -> Result<[u8; 32], GroupError> {
        let rank = self.rank;
        loop {
            match self.reports.recv_timeout(LOOK) {
                Ok(Report::Loaded { numerics_id }) => return Ok(numerics_id),
                Ok(Report::Failed { message }) => {
                    return Err(GroupError::Load { rank, message });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(GroupError::Died { rank }),
                Err(RecvTimeoutError::Timeout) if !wanted() => return Err(GroupError::Closing),
                Err(RecvTimeoutError::Timeout) if Instant::now() > until => {
                    return Err(GroupError::Slow { rank });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Whether its process has not ended.
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let killed = self.process.kill();
        if let Err(error) = killed.and_then(|()| self.process.wait()) {
            tracing::debug!(%error, rank = self.rank, "a rank was gone already");
        }
    }
}

/// Passes reports on until the line ends.
fn listen(line: &UnixStream, reports: &SyncSender<Report>) {
    loop {
        match receive(line) {
            Ok(Some((report, _))) => {
                if reports.send(report).is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Err(error) => {
                tracing::error!(%error, "a rank cannot be understood");
                return;
            }
        }
    }
}
