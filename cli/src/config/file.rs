//! The configuration file, and how it is merged with flags and environment.

use std::path::{Path, PathBuf};

use clap::{Args, Command};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{
    ConfigError, LogSettings, MembershipSettings, RouterSettings, StoreSettings, TraceSettings,
    UpSettings, WorkerSettings,
};

/// The settings of one subsystem, as a user gives them: every field is optional, its name is the
/// TOML key, and clap knows its flag and its environment variable.
pub(crate) trait Section: Args + Serialize + DeserializeOwned {
    /// The section's name in the file.
    const NAME: &'static str;
}

/// Every section with the keys that it knows.
fn sections() -> Vec<(&'static str, Vec<String>)> {
    fn keys<S: Section>() -> (&'static str, Vec<String>) {
        let command = S::augment_args(Command::new(S::NAME));
        let ids = command.get_arguments().map(|arg| arg.get_id().to_string());
        (S::NAME, ids.collect())
    }
    vec![
        keys::<LogSettings>(),
        keys::<TraceSettings>(),
        keys::<StoreSettings>(),
        keys::<MembershipSettings>(),
        keys::<UpSettings>(),
        keys::<RouterSettings>(),
        keys::<WorkerSettings>(),
    ]
}

/// A TOML file whose keys are all known; empty where none is given.
#[derive(Debug, Default)]
pub(crate) struct ConfigFile {
    path: PathBuf,
    table: Table,
}

impl ConfigFile {
    /// Reads the file and checks every key.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let table: Table = text.parse().map_err(|e: toml::de::Error| {
            let before = &text[..e.span().map_or(0, |span| span.start)];
            ConfigError::Syntax {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                message: e.message().to_owned(),
            }
        })?;
        check_keys(path, &table)?;
        Ok(Self {
            path: path.to_owned(),
            table,
        })
    }

    /// The section's settings where the command line has no flags for them: the environment's,
    /// else the file's.
    pub(crate) fn ambient<S: Section>(&self) -> Result<S, ConfigError> {
        let command = S::augment_args(Command::new(S::NAME).no_binary_name(true));
        let matches = command.try_get_matches_from([""; 0]);
        let given = matches.and_then(|matches| S::from_arg_matches(&matches));
        self.merge(&given.map_err(ConfigError::Environment)?)
    }

    /// The section's settings: `given` by flag or environment, else the file's.
    pub(crate) fn merge<S: Section>(&self, given: &S) -> Result<S, ConfigError> {
        let mut merged = match self.table.get(S::NAME) {
            Some(Value::Table(section)) => section.clone(),
            _ => Table::new(),
        };
        // One key at a time, so that a wrong value is blamed on its key.
        for (key, value) in &merged {
            let single = Table::from_iter([(key.clone(), value.clone())]);
            if let Err(e) = single.try_into::<S>() {
                return Err(ConfigError::Value {
                    path: self.path.clone(),
                    key: format!("{}.{key}", S::NAME),
                    message: e.message().to_owned(),
                });
            }
        }
        merged.extend(Table::try_from(given).map_err(ConfigError::Merge)?);
        merged.try_into().map_err(ConfigError::Unmerge)
    }
}

fn check_keys(path: &Path, table: &Table) -> Result<(), ConfigError> {
    let known = sections();
    for (name, value) in table {
        let Some((_, keys)) = known.iter().find(|(section, _)| section == name) else {
            let names = known.iter().map(|(section, _)| *section);
            return Err(unknown(path, name, names));
        };
        let Value::Table(section) = value else {
            return Err(ConfigError::NotASection {
                path: path.to_owned(),
                key: name.clone(),
            });
        };
        if let Some(key) = section.keys().find(|key| !keys.contains(key)) {
            let nearest = keys.iter().map(|key| format!("{name}.{key}"));
            return Err(unknown(path, &format!("{name}.{key}"), nearest));
        }
    }
    Ok(())
}

fn unknown<T: AsRef<str>>(path: &Path, key: &str, known: impl Iterator<Item = T>) -> ConfigError {
    let nearest = known.max_by(|a, b| {
        let score = |text: &T| strsim::jaro_winkler(key, text.as_ref());
        score(a).total_cmp(&score(b))
    });
    ConfigError::UnknownKey {
        path: path.to_owned(),
        key: key.to_owned(),
        nearest: nearest.map_or_else(String::new, |text| text.as_ref().to_owned()),
    }
}
