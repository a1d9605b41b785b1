//! Generates the wire types from the .proto files, without a protoc.

use std::error::Error;

const FILES: &[&str] = &[
    "shoal/admin/v1/admin.proto",
    "shoal/inference/v1/inference.proto",
    "shoal/router/v1/router.proto",
    "shoal/worker/v1/worker.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    tonic_prost_build::configure().compile_fds(descriptors.clone())?;
    std::fs::write(
        out.join("descriptors.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    Ok(())
}
