//! The wire of Shoal: types and services generated from `proto/`, and the file
//! descriptors that gRPC reflection serves.

// The generated code carries the comments of the .proto files, which not every item has.
#![allow(missing_docs, unreachable_pub, clippy::all)]

/// `shoal.admin.v1`: what operators see and do at a router.
pub mod admin {
    tonic::include_proto!("shoal.admin.v1");
}

/// `shoal.inference.v1`: the public API of a router.
pub mod inference {
    tonic::include_proto!("shoal.inference.v1");
}

/// `shoal.router.v1`: between routers.
pub mod router {
    tonic::include_proto!("shoal.router.v1");
}

/// `shoal.worker.v1`: between routers and workers.
pub mod worker {
    tonic::include_proto!("shoal.worker.v1");

    impl ModelDescription {
        /// The numerics id as operators read it, in lower-case hex.
        pub fn numerics_hex(&self) -> String {
            let bytes = self.numerics_id.iter();
            bytes.map(|byte| format!("{byte:02x}")).collect()
        }
    }
}

/// The encoded `FileDescriptorSet` of every service of this crate.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The version of the router–worker protocol that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;
