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

    impl SequenceOutput {
        /// Appends what its sequence said later. One that runs ahead of another may have gone
        /// back: what it says anew replaces what it said before.
        pub fn merge(&mut self, later: Self) {
            match later.output_offset.checked_sub(self.output_offset) {
                Some(kept) => self.tokens.truncate(kept as usize),
                None => {
                    self.tokens.clear();
                    self.output_offset = later.output_offset;
                }
            }
            self.tokens.extend(later.tokens);
            self.logprobs.extend(later.logprobs);
            self.prompt_logprobs.extend(later.prompt_logprobs);
            self.finish = later.finish;
            self.usage = later.usage;
        }
    }

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

/// Largest message of a router that a worker takes, in bytes. A larger one would end its
/// stream, with every sequence on it.
pub const MAX_ROUTER_FRAME: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::worker::SequenceOutput;

    fn output(offset: u32, tokens: &[u32]) -> SequenceOutput {
        SequenceOutput {
            output_offset: offset,
            tokens: tokens.to_vec(),
            ..SequenceOutput::default()
        }
    }

    #[test]
    fn what_is_said_anew_replaces_what_was_said_before() {
        for (later, offset, tokens) in [
            (output(7, &[3]), 5, &[1, 2, 3][..]),
            (output(6, &[3]), 5, &[1, 3]),
            (output(4, &[3]), 4, &[3]),
        ] {
            let mut merged = output(5, &[1, 2]);
            merged.merge(later);
            assert_eq!((merged.output_offset, &*merged.tokens), (offset, tokens));
        }
    }
}
