//! Model files of the Hugging Face Hub, kept in the hub's own cache layout.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};
use url::Url;

use super::download::{Client, persist, unwritable};
use super::progress::Progress;
use super::{SourceError, StoreError, entries, locked};

/// `hf://org/repo/path/to/file.gguf@revision`; the revision is `main` where none is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubFile {
    repo: String,
    file: String,
    revision: String,
}

impl FromStr for HubFile {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let malformed = || SourceError::Malformed(text.to_owned());
        let rest = text.strip_prefix("hf://").ok_or_else(malformed)?;
        let (path, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let mut parts = path.splitn(3, '/');
        let (Some(org), Some(name), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(malformed());
        };
        // The parts become paths in the cache: none may climb out of it.
        let plain = |part: &str| {
            let names = part.split('/');
            names.clone().all(|n| !matches!(n, "" | "." | "..")) && !part.contains('\\')
        };
        if ![org, name, file, revision].into_iter().all(plain) {
            return Err(malformed());
        }
        Ok(Self {
            repo: format!("{org}/{name}"),
            file: file.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

impl fmt::Display for HubFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://{}/{}@{}", self.repo, self.file, self.revision)
    }
}

/// The path of `wanted` in the hub cache at `dir`, fetched from `endpoint` if it is not there.
///
/// Files in large-file storage carry their SHA-256 as the entity tag and are held against it.
pub(crate) fn resolve(
    wanted: &HubFile,
    dir: &Path,
    endpoint: &str,
    token: Option<&str>,
) -> Result<PathBuf, StoreError> {
    let repo = Repo::with_revision(
        wanted.repo.clone(),
        RepoType::Model,
        wanted.revision.clone(),
    );
    let cache = Cache::new(dir.to_owned()).repo(repo.clone());
    if let Some(path) = cache.get(&wanted.file) {
        return Ok(path);
    }
    let lock = format!("{}--{}", repo.folder_name(), wanted.file.replace('/', "--"));
    let _lock = locked(dir, &lock)?;
    if let Some(path) = cache.get(&wanted.file) {
        return Ok(path);
    }

    let url = ApiBuilder::from_cache(Cache::new(dir.to_owned()))
        .with_endpoint(endpoint.trim_end_matches('/').to_owned())
        .build()
        .map_err(StoreError::Hub)?
        .repo(repo)
        .url(&wanted.file);
    let client = Client::new();
    let answer = client.head(&url, token)?;
    let header = |name| {
        let value = answer.headers().get(name)?;
        Some(value.to_str().ok()?.trim_matches('"').to_owned())
    };
    let missing = |header| StoreError::HubHeader {
        url: url.clone(),
        header,
    };
    let commit = header("x-repo-commit").ok_or_else(|| missing("x-repo-commit"))?;
    let etag = header("x-linked-etag").or_else(|| header("etag"));
    let etag = etag.ok_or_else(|| missing("etag"))?;
    // Both become file names.
    let is_name = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !is_name(&commit) {
        return Err(missing("x-repo-commit"));
    }
    if !is_name(&etag) {
        return Err(missing("etag"));
    }
    let sha256 = (etag.len() == 64).then_some(etag.as_str());
    let (from, token) = match header("location") {
        Some(location) => {
            let address = |source| StoreError::Address {
                address: location.clone(),
                source,
            };
            let base = Url::parse(&url).map_err(address)?;
            let target = base.join(&location).map_err(address)?;
            // The token is for the hub alone, not for the storage behind it.
            let same = target.origin() == base.origin();
            (String::from(target), token.filter(|_| same))
        }
        None => (url.clone(), token),
    };

    let blob = cache.blob_path(&etag);
    let pointer = cache.pointer_path(&commit).join(&wanted.file);
    for path in [&blob, &pointer] {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|e| unwritable(parent, e))?;
        }
    }
    if !blob.exists() {
        let progress = Progress::new("downloading", &wanted.file);
        let parent = blob.parent().unwrap_or(dir);
        let file = client.fetch(&from, token, parent, sha256, &progress)?;
        persist(file, &blob)?;
    }
    if !pointer.exists() {
        // Relative, so that the cache can move.
        let depth = 2 + wanted.file.split('/').count() - 1;
        let target: PathBuf = std::iter::repeat_n("..", depth)
            .chain(["blobs", &etag])
            .collect();
        std::os::unix::fs::symlink(&target, &pointer).map_err(|e| unwritable(&pointer, e))?;
    }
    cache.create_ref(&commit).map_err(|e| unwritable(dir, e))?;
    Ok(pointer)
}

/// The cached GGUF files of the hub cache at `dir`, as (`hf://` name, path).
pub(super) fn list(dir: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let mut found = Vec::new();
    for repo_dir in entries(dir)? {
        let Some(repo) = repo_dir
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix("models--"))
            .and_then(|name| name.split_once("--"))
            .map(|(org, name)| format!("{org}/{name}"))
        else {
            continue;
        };
        for reference in files_below(&repo_dir.join("refs"))? {
            let Ok(commit) = std::fs::read_to_string(repo_dir.join("refs").join(&reference)) else {
                continue;
            };
            let snapshot = repo_dir.join("snapshots").join(commit.trim());
            for file in files_below(&snapshot)? {
                if file.extension().is_some_and(|e| e == "gguf") {
                    let wanted = HubFile {
                        repo: repo.clone(),
                        file: file.display().to_string(),
                        revision: reference.display().to_string(),
                    };
                    found.push((wanted.to_string(), snapshot.join(&file)));
                }
            }
        }
    }
    Ok(found)
}

/// Every file below `dir`, relative to it.
fn files_below(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut files = Vec::new();
    let mut todo = entries(dir)?;
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(entries(&path)?);
        } else if let Ok(relative) = path.strip_prefix(dir) {
            files.push(relative.to_owned());
        }
    }
    Ok(files)
}
