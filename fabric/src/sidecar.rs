//! A runtime on a thread of its own, for what must go on however busy the process is.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The thread ends, and its tasks with it, when this is dropped. One on a runtime of others has
/// no thread, and its tasks end with that runtime.
#[derive(Debug)]
pub(crate) struct Sidecar {
    handle: Handle,
    _running: Option<DropGuard>,
}

impl Sidecar {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the operating system gives none.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let running = stop.clone().drop_guard();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || runtime.block_on(stop.cancelled()))?;
        Ok(Self {
            handle,
            _running: Some(running),
        })
    }

    /// On a runtime of others.
    pub(crate) fn on(handle: Handle) -> Self {
        Self {
            handle,
            _running: None,
        }
    }

    /// Its runtime.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}
