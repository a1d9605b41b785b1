//! The real model that tests run.

use std::env;
use std::path::PathBuf;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Path of the demo model: `SHOAL_TEST_MODEL`, or where `shoal` caches it.
///
/// # Panics
/// If there is none: a test without its model has failed.
pub fn demo_model() -> PathBuf {
    let path = match env::var_os("SHOAL_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => cache().join("models").join(FILE),
    };
    assert!(
        path.is_file(),
        "no model at {}: run ./tests/run, which fetches it, or set SHOAL_TEST_MODEL",
        path.display()
    );
    path
}

fn cache() -> PathBuf {
    let home = || PathBuf::from(env::var_os("HOME").unwrap_or_default());
    match env::var_os("SHOAL_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => home().join(".cache/shoal"),
    }
}

/// A file of `tests/data`.
///
/// # Panics
/// If it cannot be read.
pub fn data(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("data")
        .join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
