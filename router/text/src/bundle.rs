//! Tokenizer bundles: what a router needs of a model file, addressed by its content.

use prost::Message;
use sha2::{Digest, Sha256};
use shoal_proto::worker::TokenizerBundle;

use crate::error::TextError;

/// A bundle as it travels, with its address. Equal bundles have equal bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedBundle {
    /// The encoded message.
    pub bytes: Vec<u8>,
    /// SHA-256 of `bytes`.
    pub sha256: [u8; 32],
}

impl EncodedBundle {
    /// Encodes `bundle`.
    pub fn new(bundle: &TokenizerBundle) -> Self {
        let bytes = bundle.encode_to_vec();
        let sha256 = Sha256::digest(&bytes).into();
        Self { bytes, sha256 }
    }
}

/// Reads a bundle that was asked for by its address.
///
/// # Errors
/// If `bytes` are not what `sha256` names, or no bundle.
pub fn decode_bundle(bytes: &[u8], sha256: &[u8]) -> Result<TokenizerBundle, TextError> {
    if Sha256::digest(bytes)[..] != *sha256 {
        return Err(TextError::WrongDigest);
    }
    Ok(TokenizerBundle::decode(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_read_back_only_under_its_address() {
        let bundle = TokenizerBundle {
            tokens: vec!["a".into(), "b".into()],
            bos: Some(0),
            ..Default::default()
        };
        let encoded = EncodedBundle::new(&bundle);
        assert_eq!(encoded, EncodedBundle::new(&bundle.clone()));
        assert_eq!(
            decode_bundle(&encoded.bytes, &encoded.sha256).expect("valid"),
            bundle
        );
        let mut cut = encoded.bytes.clone();
        cut.pop();
        assert!(matches!(
            decode_bundle(&cut, &encoded.sha256),
            Err(TextError::WrongDigest)
        ));
    }
}
