//! Truncated and corrupted files: a typed error or a consistent view, never a panic, and
//! never more memory than the file's size accounts for.
//!
//! A test binary of its own with one test, so that the allocations it counts are its own.

use std::alloc::System;
use std::path::Path;

use cap::Cap;
use shoal_gguf::Gguf;

#[path = "../../../tests/fuzz/walk.rs"]
mod walk;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Bytes allocated by one parse, all together, per byte of the file.
const MOST_PER_BYTE: usize = 64;
/// The same for any file: hash tables do not start at nothing.
const MOST_BESIDE: usize = 4096;

/// Parses and walks; says whether the file was good.
fn check(name: &str, bytes: &[u8]) -> bool {
    let most = MOST_PER_BYTE * bytes.len() + MOST_BESIDE;
    let bytes = bytes.to_vec();
    let before = ALLOCATOR.total_allocated();
    let parsed = Gguf::parse(bytes);
    let allocated = ALLOCATOR.total_allocated() - before;
    assert!(
        allocated <= most,
        "{name}: {allocated} bytes allocated, {most} allowed"
    );
    match parsed {
        Ok(gguf) => {
            walk::walk(&gguf);
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

#[test]
fn hostile_files_are_refused_cheaply() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/gguf");
    let mut good = Vec::new();
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("seed-") {
            continue;
        }
        let seed = std::fs::read(&path).unwrap();
        if check(name, &seed) {
            truncate(name, &seed);
            good.push(name.to_owned());
        }
        flip_bits(name, &seed);
        claim_sizes(name, &seed);
    }
    good.sort();
    assert_eq!(
        good,
        [
            "seed-alignment-8",
            "seed-empty",
            "seed-every-type",
            "seed-version-2"
        ]
    );
}

/// Every proper prefix lacks something: the seeds end with their last tensor's last byte.
fn truncate(name: &str, seed: &[u8]) {
    for len in 0..seed.len() {
        assert!(
            !check(name, &seed[..len]),
            "{name} cut to {len} bytes parsed"
        );
    }
}

fn flip_bits(name: &str, seed: &[u8]) {
    let mut bytes = seed.to_vec();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            check(name, &bytes);
            bytes[at] ^= 1 << bit;
        }
    }
}

/// Puts hostile numbers wherever a count, a length, an offset or a type may be.
fn claim_sizes(name: &str, seed: &[u8]) {
    let len = seed.len() as u64;
    let numbers = [
        0,
        1,
        9,
        len - 1,
        len,
        u64::from(u32::MAX),
        1 << 32,
        1 << 60,
        i64::MAX as u64,
        u64::MAX,
    ];
    for at in 0..seed.len() {
        for number in numbers {
            for width in [4, 8] {
                let mut bytes = seed.to_vec();
                let width = width.min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
                check(name, &bytes);
            }
        }
    }
}
