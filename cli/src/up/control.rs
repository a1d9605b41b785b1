//! The line between a supervisor and one of its processes: JSON lines over the socket that is
//! the process's standard input.
//!
//! The process sends [`Report`]s, the supervisor [`Order`]s. The end of the line is the end of
//! the supervisor, however it came about: the process then ends too.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_fabric::membership::{Local, Member};
use shoal_fabric::shutdown::Shutdown;

/// Longest line that either side reads.
pub(super) const MAX_LINE: u64 = 64 << 10;

/// What an orphan may take to end in order.
const ORPHAN_GRACE: Duration = Duration::from_millis(500);

/// What a process tells its supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// Clients can connect to this address.
    Listening(SocketAddr),
    /// Requests are served.
    Ready,
    /// The role ended with this error.
    Failed(String),
}

/// What a supervisor tells a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// To a router: the workers there are now.
    Workers(Vec<Member>),
    /// Finish what runs, then end.
    Drain,
}

/// `message` as a line.
pub(super) fn line<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// The process's end of the line.
#[derive(Debug)]
pub(crate) struct Control {
    stream: UnixStream,
    workers: Local,
}

impl Control {
    /// Takes over standard input and follows the supervisor's orders from now on.
    pub(crate) fn attach(shutdown: Shutdown) -> io::Result<Self> {
        let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        // A supervisor that reads nothing must not hold this process up.
        stream.set_write_timeout(Some(ORPHAN_GRACE))?;
        let orders = stream.try_clone()?;
        let workers = Local::default();
        let members = workers.clone();
        // A thread of its own: it must see the end even where the runtime hangs.
        std::thread::Builder::new()
            .name("supervisor".to_owned())
            .spawn(move || {
                follow(orders, &shutdown, &members);
                tracing::warn!("the supervisor is gone");
                shutdown.start();
                std::thread::sleep(ORPHAN_GRACE);
                std::process::exit(1);
            })?;
        Ok(Self { stream, workers })
    }

    /// The workers of the same supervisor.
    pub(crate) fn workers(&self) -> Local {
        self.workers.clone()
    }

    /// Tells the supervisor.
    pub(crate) fn report(&self, report: &Report) -> io::Result<()> {
        (&self.stream).write_all(&line(report)?)
    }
}

/// Until the line ends or breaks.
fn follow(stream: impl Read, shutdown: &Shutdown, workers: &Local) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(n) if n > 0 => {}
            _ => return,
        }
        match serde_json::from_slice(&line) {
            Ok(Order::Drain) => shutdown.start(),
            Ok(Order::Workers(members)) => workers.set(members),
            Err(error) => {
                tracing::error!(%error, "the supervisor cannot be understood");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_fabric::membership::Membership;

    use super::*;

    #[test]
    fn orders_are_followed_until_the_line_ends() {
        let shutdown = Shutdown::new();
        let workers = Local::default();
        let member = Member::at("127.0.0.1:1234".parse().unwrap());
        let mut text = line(&Order::Workers(vec![member.clone()])).unwrap();
        follow(text.as_slice(), &shutdown, &workers);
        assert_eq!(workers.watch().borrow().workers, [member]);
        assert!(!shutdown.is_started());
        text.extend(line(&Order::Drain).unwrap());
        follow(text.as_slice(), &shutdown, &workers);
        assert!(shutdown.is_started());
    }

    #[test]
    fn a_line_that_is_none_ends_it() {
        let shutdown = Shutdown::new();
        let endless = io::repeat(b'x');
        follow(endless, &shutdown, &Local::default());
    }
}
