//! Byte-level byte-pair encoding (GPT-2 and most models since).

use rustc_hash::FxHashMap;
use shoal_core::TokenId;
use shoal_proto::worker::TokenizerBundle;

use crate::byte_level::{Decoder, alphabet};
use crate::error::TextError;
use crate::merge::{Merge, Merger};
use crate::pretokenize::{PreTokenizer, variant};
use crate::vocab::{TokenKind, Vocab};

/// The merges of a model, and how its texts are cut before merging.
pub(crate) struct ByteBpe {
    splitter: PreTokenizer,
    /// The token of each byte.
    bytes: [Option<TokenId>; 256],
    /// (left, right) → the merge, urgent ones with small priority.
    merges: FxHashMap<(TokenId, TokenId), Merge<TokenId>>,
    /// Pieces that are tokens as they stand, where the variant takes those unmerged.
    whole: FxHashMap<Box<[u8]>, TokenId>,
}

impl ByteBpe {
    /// Reads vocabulary and merges of `bundle`.
    pub(crate) fn new(bundle: &TokenizerBundle) -> Result<(Self, Vocab), TextError> {
        let variant = variant(&bundle.pre).ok_or_else(|| TextError::UnknownPreTokenizer {
            pre: bundle.pre.clone(),
        })?;
        let splitter = PreTokenizer::new(&variant).map_err(|source| TextError::PreTokenizer {
            pre: bundle.pre.clone(),
            source,
        })?;
        let decoder = Decoder::new();
        let vocab = Vocab::new(bundle, |text, out| decoder.decode(text, out))?;

        let texts: FxHashMap<&str, TokenId> =
            bundle.tokens.iter().map(String::as_str).zip(0..).collect();
        let bytes =
            alphabet().map(|char| texts.get(char.encode_utf8(&mut [0; 4]) as &str).copied());
        let merges = read_merges(&bundle.merges, &texts)?;
        let whole = if variant.whole_pieces {
            vocab
                .kinds()
                .filter(|&(_, kind)| kind == TokenKind::Normal)
                .map(|(token, _)| (vocab.bytes(token).into(), token))
                .collect()
        } else {
            FxHashMap::default()
        };
        Ok((
            Self {
                splitter,
                bytes,
                merges,
                whole,
            },
            vocab,
        ))
    }

    /// Appends the tokens of `text`.
    pub(crate) fn encode(
        &self,
        text: &str,
        merger: &mut Merger<TokenId>,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TextError> {
        self.splitter.split(text, &mut |piece| {
            if let Some(&token) = self.whole.get(piece.as_bytes()) {
                out.push(token);
                return Ok(());
            }
            for &byte in piece.as_bytes() {
                if self.bytes[usize::from(byte)].is_none() {
                    return Err(TextError::NoTokenForByte { byte });
                }
            }
            merger.run(
                piece
                    .bytes()
                    .filter_map(|byte| self.bytes[usize::from(byte)]),
                |left, right| self.merges.get(&(left, right)).copied(),
                |token| {
                    out.push(token);
                    Ok(())
                },
            )
        })
    }
}

/// Reads merges ("left right", most urgent first); the first of equal ones counts.
fn read_merges(
    merges: &[String],
    texts: &FxHashMap<&str, TokenId>,
) -> Result<FxHashMap<(TokenId, TokenId), Merge<TokenId>>, TextError> {
    let mut table = FxHashMap::with_capacity_and_hasher(merges.len(), Default::default());
    let mut joined = String::new();
    for ((rank, merge), priority) in merges.iter().enumerate().zip(0..) {
        let entry = merge.split_once(' ').and_then(|(left, right)| {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            Some((
                (*texts.get(left)?, *texts.get(right)?),
                *texts.get(joined.as_str())?,
            ))
        });
        let Some((pair, symbol)) = entry else {
            return Err(TextError::InvalidMerge {
                rank,
                merge: merge.clone(),
            });
        };
        table.entry(pair).or_insert(Merge { priority, symbol });
    }
    Ok(table)
}
