//! `[log]`: what is logged, and how.

use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_fabric::telemetry::{LogConfig, LogFormat, TelemetryError};

use super::Section;

/// Logs.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Logs")]
pub(crate) struct LogSettings {
    /// What is logged: a level, or directives such as info,shoal_worker=debug [default: info]
    #[arg(long = "log", global = true, env = "SHOAL_LOG", value_name = "FILTER")]
    pub(crate) filter: Option<String>,

    /// human: lines for people; json: one object a line [default: human]
    #[arg(
        long = "log-format",
        global = true,
        env = "SHOAL_LOG_FORMAT",
        value_name = "FORMAT"
    )]
    pub(crate) format: Option<String>,
}

impl Section for LogSettings {
    const NAME: &'static str = "log";
}

impl LogSettings {
    /// The configuration, with `default` as the filter where none is given.
    pub(crate) fn config(self, default: &str) -> Result<LogConfig, TelemetryError> {
        let format = match self.format {
            Some(format) => format.parse()?,
            None => LogFormat::default(),
        };
        let filter = self.filter.unwrap_or_else(|| default.to_owned());
        Ok(LogConfig { format, filter })
    }
}

/// Arguments with which this program runs `role` and logs as `log` says.
pub(super) fn arguments(role: &str, log: &LogConfig) -> Vec<String> {
    let format = match log.format {
        LogFormat::Human => "human",
        LogFormat::Json => "json",
    };
    let arguments = [role, "--log", &log.filter, "--log-format", format];
    arguments.map(str::to_owned).into()
}
