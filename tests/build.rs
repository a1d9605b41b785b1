//! Generates both sides of etcd's API, for the etcd of the simulation.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let proto = "../fabric/proto";
    println!("cargo::rerun-if-changed={proto}");
    let descriptors = protox::compile(["etcd.proto"], [proto])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
