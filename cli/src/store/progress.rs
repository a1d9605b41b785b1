//! How far a download is: a bar on a terminal, log lines elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Shares of the whole between two log lines.
const LOG_EVERY_PERCENT: u64 = 20;

/// The progress of one file.
pub(crate) struct Progress {
    verb: &'static str,
    file: String,
    bar: Option<ProgressBar>,
    total: Cell<Option<u64>>,
    done: Cell<u64>,
    logged: Cell<u64>,
}

impl Progress {
    /// Reports on standard error what (`verb`) is done to `file`.
    pub(crate) fn new(verb: &'static str, file: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::no_length().with_message(format!("{verb} {file}"));
            let template = "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
            match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self {
            verb,
            file: file.to_owned(),
            bar,
            total: Cell::new(None),
            done: Cell::new(0),
            logged: Cell::new(0),
        }
    }

    /// Starts to count; `total` is in bytes, where it is known.
    pub(crate) fn begin(&self, total: Option<u64>) {
        self.total.set(total);
        match (&self.bar, total) {
            (Some(bar), Some(total)) => bar.set_length(total),
            (Some(_), None) => {}
            (None, Some(total)) => {
                tracing::info!(file = %self.file, size = %HumanBytes(total), "{}", self.verb);
            }
            (None, None) => tracing::info!(file = %self.file, "{}", self.verb),
        }
    }

    /// `n` more bytes have arrived.
    pub(crate) fn advance(&self, n: u64) {
        let done = self.done.get() + n;
        self.done.set(done);
        if let Some(bar) = &self.bar {
            bar.inc(n);
        } else if let Some(total) = self.total.get().filter(|&total| total > 0) {
            let percent = done * 100 / total;
            if percent / LOG_EVERY_PERCENT > self.logged.get() / LOG_EVERY_PERCENT {
                self.logged.set(percent);
                tracing::info!(file = %self.file, percent, "{}", self.verb);
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
