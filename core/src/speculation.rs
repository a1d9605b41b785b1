//! How much a request is drafted for, and whose text may draft for it.

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::TokenId;

/// Most draft rows that one sequence has in a step.
pub const MAX_DRAFT_ROWS: u32 = 32;

/// How many draft tokens are verified for a sequence. It changes the speed, never a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// As many as pay, by what they cost and how often they have been right.
    #[default]
    Auto,
    /// None.
    Off,
    /// As many as were found, up to this many; at most [`MAX_DRAFT_ROWS`].
    Fixed(u32),
}

/// Not a way to speculate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("speculation is auto, off, or a number of draft rows from 1 to 32, not {given:?}")]
pub struct SpeculationError {
    given: String,
}

impl Speculation {
    /// So many draft rows.
    ///
    /// # Errors
    /// When there are none, or more than [`MAX_DRAFT_ROWS`].
    pub fn fixed(rows: u64) -> Result<Self, SpeculationError> {
        match u32::try_from(rows) {
            Ok(rows @ 1..=MAX_DRAFT_ROWS) => Ok(Self::Fixed(rows)),
            _ => Err(SpeculationError {
                given: rows.to_string(),
            }),
        }
    }
}

impl FromStr for Speculation {
    type Err = SpeculationError;

    fn from_str(s: &str) -> Result<Self, SpeculationError> {
        match s {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            other => other
                .parse()
                .map_err(|_| SpeculationError {
                    given: other.into(),
                })
                .and_then(Self::fixed),
        }
    }
}

impl fmt::Display for Speculation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Fixed(rows) => rows.fmt(f),
        }
    }
}

/// Tokens that an anchor covers.
const ANCHOR_TOKENS: usize = 8;

/// The anchor of a draft that was made elsewhere: a hash of the last tokens before it, by which
/// a worker sees that it belongs where it says.
pub fn draft_anchor(before: &[TokenId]) -> u32 {
    let mut hash = Xxh3::new();
    for token in &before[before.len().saturating_sub(ANCHOR_TOKENS)..] {
        hash.update(&token.to_le_bytes());
    }
    hash.digest() as u32
}

/// The wall around text that drafts: a text drafts within its own scope only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DraftScope([u8; 16]);

impl DraftScope {
    /// What all users of a tenant may see, of one model, tokenizer and salt. Collision-resistant
    /// (SHA-256, cut to 128 bits), so no name reaches another's text.
    pub fn tenant(model: &str, tokenizer: &[u8], tenant: &str, salt: &str) -> Self {
        let parts = [model.as_bytes(), tokenizer, tenant.as_bytes()];
        Self::hash(b"tenant", &parts, salt.as_bytes())
    }

    /// What one user of the tenant wrote, for that user alone.
    pub fn user(self, user: &str) -> Self {
        Self::hash(b"user", &[&self.0], user.as_bytes())
    }

    /// Public text that was loaded for the tenant.
    pub fn public(self) -> Self {
        Self::hash(b"public", &[&self.0], b"")
    }

    fn hash(kind: &[u8], parts: &[&[u8]], last: &[u8]) -> Self {
        Self(name_hash(kind, parts, last))
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

/// A tenant, or a user of one, whatever the model and the salt: what an erasure names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject([u8; 16]);

impl Subject {
    /// A tenant. Collision-resistant, as a [`DraftScope`] is.
    pub fn tenant(name: &str) -> Self {
        Self(name_hash(b"tenant subject", &[], name.as_bytes()))
    }

    /// A user of the tenant.
    pub fn user(self, name: &str) -> Self {
        Self(name_hash(b"user subject", &[&self.0], name.as_bytes()))
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

/// SHA-256 of names that cannot run together, cut to 128 bits.
fn name_hash(kind: &[u8], parts: &[&[u8]], last: &[u8]) -> [u8; 16] {
    let mut sha = Sha256::new();
    for part in [kind].iter().chain(parts) {
        sha.update((part.len() as u64).to_le_bytes());
        sha.update(part);
    }
    sha.update(last);
    let digest = sha.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_parses_and_prints() {
        for text in ["auto", "off", "1", "32"] {
            assert_eq!(text.parse::<Speculation>().unwrap().to_string(), text);
        }
        for wrong in ["", "on", "0", "33", "-1", "99999999999999999999"] {
            assert!(wrong.parse::<Speculation>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn scopes_do_not_run_together() {
        let base = DraftScope::tenant("m", b"t", "acme", "");
        let others = [
            DraftScope::tenant("m", b"t", "acm", "e"),
            DraftScope::tenant("mt", b"", "acme", ""),
            DraftScope::tenant("m", b"t", "acme", "salt"),
            base.user(""),
            base.user("a"),
            base.public(),
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(base, *other);
            assert!(others[..i].iter().all(|before| before != other));
        }
    }

    #[test]
    fn subjects_do_not_run_together() {
        let acme = Subject::tenant("acme");
        assert_ne!(acme, acme.user(""));
        assert_ne!(acme.user("a"), acme.user("b"));
        assert_ne!(acme.user("a"), Subject::tenant("other").user("a"));
        assert_eq!(Subject::from_bytes(acme.as_bytes()), Some(acme));
        assert_eq!(Subject::from_bytes(b"short"), None);
    }
}
