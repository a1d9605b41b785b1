//! KV pages and their chained hashes.

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::TokenId;

/// Tokens in a KV page, on every backend.
pub const PAGE_TOKENS: usize = 32;

/// Pinned: routers and workers hash alike.
const SEED: u64 = 0x5368_6f61_6c00_0001;

/// Whether a token was given or made. Prompt tokens are computed on the prefill path and
/// output tokens on the decode path, so pages of equal tokens but other roles may differ
/// in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Given by the request.
    Prompt,
    /// Made by the model for this request.
    Output,
}

/// The wall between users of one cache: pages are shared within a namespace only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Namespace([u8; 16]);

impl Namespace {
    /// The namespace of a tenant and an optional salt of the request. Collision-resistant
    /// (SHA-256, cut to 128 bits), so no salt reaches another tenant's pages.
    pub fn new(tenant: &str, salt: &str) -> Self {
        let mut sha = Sha256::new();
        sha.update((tenant.len() as u64).to_le_bytes());
        sha.update(tenant);
        sha.update(salt);
        let digest = sha.finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        Self(bytes)
    }

    /// From the wire; `None` unless it is 16 bytes long.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// As it goes over the wire.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// The hash of a full page and of everything before it.
///
/// Not collision-resistant against an adversary: whoever reuses a page by its hash must
/// compare namespace and tokens as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageHash(u128);

impl PageHash {
    /// The parent of a first page: the namespace and the numerics of the KV values.
    pub fn root(namespace: &Namespace, numerics_id: &[u8]) -> Self {
        let mut h = Xxh3::with_seed(SEED);
        h.update(&namespace.0);
        h.update(numerics_id);
        Self(h.digest128())
    }

    /// The hash of a page of [`PAGE_TOKENS`] tokens after `self`. Bit i of `outputs` is set
    /// where token i has [`Role::Output`].
    pub fn child(self, tokens: &[TokenId; PAGE_TOKENS], outputs: u32) -> Self {
        let mut h = Xxh3::with_seed(SEED);
        h.update(&self.0.to_le_bytes());
        h.update(&outputs.to_le_bytes());
        for token in tokens {
            h.update(&token.to_le_bytes());
        }
        Self(h.digest128())
    }

    /// As it goes over the wire, little-endian.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From the wire.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }
}

/// The hashes of the full pages of a prompt, in order.
pub fn prompt_pages(
    namespace: &Namespace,
    numerics_id: &[u8],
    prompt: &[TokenId],
) -> impl Iterator<Item = PageHash> {
    let mut hash = PageHash::root(namespace, numerics_id);
    let (pages, _) = prompt.as_chunks::<PAGE_TOKENS>();
    pages.iter().map(move |page| {
        hash = hash.child(page, 0);
        hash
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_hash() {
        let root = PageHash::root(&Namespace::new("default", ""), b"n");
        let page = root.child(&std::array::from_fn(|i| i as u32), 0);
        assert_eq!(
            format!("{:032x}", page.0),
            "7c7c730cfc56d08d82a5c5bea57d6cf2"
        );
    }

    #[test]
    fn every_part_counts() {
        let tokens: [u32; PAGE_TOKENS] = std::array::from_fn(|i| i as u32);
        let root = PageHash::root(&Namespace::new("t", ""), b"n");
        let page = root.child(&tokens, 0);
        assert_ne!(page, root.child(&tokens, 1));
        assert_ne!(page, page.child(&tokens, 0));
        assert_ne!(
            page,
            PageHash::root(&Namespace::new("t", "s"), b"n").child(&tokens, 0)
        );
        assert_ne!(
            page,
            PageHash::root(&Namespace::new("t", ""), b"m").child(&tokens, 0)
        );
        let mut other = tokens;
        other[31] ^= 1;
        assert_ne!(page, root.child(&other, 0));
    }

    #[test]
    fn a_prompt_has_a_hash_per_full_page() {
        let prompt: Vec<u32> = (0..2 * PAGE_TOKENS as u32 + 5).collect();
        let namespace = Namespace::new("t", "");
        let pages: Vec<_> = prompt_pages(&namespace, b"n", &prompt).collect();
        let (tokens, _) = prompt.as_chunks();
        let first = PageHash::root(&namespace, b"n").child(&tokens[0], 0);
        assert_eq!(pages, [first, first.child(&tokens[1], 0)]);
        assert_eq!(PageHash::from_bytes(first.to_bytes()), first);
    }

    #[test]
    fn tenant_and_salt_do_not_run_together() {
        assert_ne!(Namespace::new("ab", "c"), Namespace::new("a", "bc"));
    }
}
