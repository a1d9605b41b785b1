//! The identity of the weights.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest, Sha256};
use shoal_gguf::{Gguf, TensorView};
use xxhash_rust::xxh3::xxh3_128;

use crate::spec::ModelSpec;

/// What of a [`crate::backend::NumericsId`] comes from the model: a hash of every tensor
/// (name, type, shape and all of its bytes) and of the numbers of the spec that enter the
/// arithmetic. Tokenizer, template and name of the model do not count.
///
/// Tensor bytes are hashed with XXH3 on every core, so it costs one read of the file (a few
/// gigabytes per second and core). It tells files apart; it does not authenticate them.
pub fn weights_digest(gguf: &Gguf, spec: &ModelSpec) -> [u8; 32] {
    let tensors: Vec<TensorView<'_>> = gguf.tensors().collect();
    let mut sha = Sha256::new();
    hash_spec(spec, &mut sha);
    for (tensor, data) in tensors.iter().zip(hash_data(&tensors)) {
        sha.update((tensor.name.len() as u64).to_le_bytes());
        sha.update(tensor.name);
        sha.update(tensor.ty.to_string());
        sha.update((tensor.shape.len() as u64).to_le_bytes());
        for &dim in tensor.shape {
            sha.update((dim as u64).to_le_bytes());
        }
        sha.update(data.to_le_bytes());
    }
    sha.finalize().into()
}

fn hash_spec(spec: &ModelSpec, sha: &mut Sha256) {
    // Every field is named, so that a new one is thought of here.
    let ModelSpec {
        architecture,
        name: _,
        quantization: _,
        n_layer,
        d_model,
        n_head,
        n_kv_head,
        head_dim,
        d_ff,
        vocab,
        context: _,
        rope,
        rms_eps,
        qkv_bias,
        qk_norm,
        tied_head,
    } = spec;
    sha.update(architecture.name());
    for &dim in [n_layer, d_model, n_head, n_kv_head, head_dim, d_ff, vocab] {
        sha.update((dim as u64).to_le_bytes());
    }
    sha.update([
        rope.kind as u8,
        *qkv_bias as u8,
        *qk_norm as u8,
        *tied_head as u8,
    ]);
    for number in rope.inv_freq.iter().chain([&rope.magnitude, rms_eps]) {
        sha.update(number.to_le_bytes());
    }
}

/// The hash of each tensor's bytes, in order.
fn hash_data(tensors: &[TensorView<'_>]) -> Vec<u128> {
    let next = AtomicUsize::new(0);
    let hash_some = || {
        std::iter::from_fn(|| {
            let index = next.fetch_add(1, Ordering::Relaxed);
            tensors
                .get(index)
                .map(|tensor| (index, xxh3_128(tensor.data)))
        })
        .collect::<Vec<_>>()
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut hashes = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(hash_some)).collect();
        let mut hashes = hash_some();
        for other in others {
            match other.join() {
                Ok(part) => hashes.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        hashes
    });
    hashes.sort_unstable_by_key(|(index, _)| *index);
    hashes.into_iter().map(|(_, hash)| hash).collect()
}
