//! Any bytes are a GGUF file or a typed error, and a file that parses can be read throughout.

#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_gguf::Gguf;

#[path = "../walk.rs"]
mod walk;

fuzz_target!(|data: &[u8]| {
    match Gguf::parse(data.to_vec()) {
        Ok(gguf) => walk::walk(&gguf),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
