//! Finds tokens that are recognised in the text as they stand, before any merging.

use std::collections::BTreeMap;

use aho_corasick::{AhoCorasick, BuildError};
use shoal_core::TokenId;

use crate::vocab::{TokenKind, Vocab};

/// A stretch of text without special tokens, or one of those.
pub(crate) enum Fragment<'t> {
    Text(&'t str),
    Token(TokenId),
}

/// A set of tokens to find.
struct Finder {
    automaton: AhoCorasick,
    tokens: Vec<TokenId>,
}

impl Finder {
    fn new(vocab: &Vocab, wanted: impl Fn(TokenKind) -> bool) -> Result<Option<Self>, BuildError> {
        let tokens: Vec<TokenId> = vocab
            .kinds()
            .filter(|&(token, kind)| wanted(kind) && !vocab.bytes(token).is_empty())
            .map(|(token, _)| token)
            .collect();
        if tokens.is_empty() {
            return Ok(None);
        }
        let automaton = AhoCorasick::new(tokens.iter().map(|&token| vocab.bytes(token)))?;
        Ok(Some(Self { automaton, tokens }))
    }

    /// The occurrences that count, from left to right: longer tokens win over shorter ones
    /// that overlap them, wherever they start, then earlier ones over later ones.
    fn occurrences(&self, text: &str) -> Vec<(usize, usize, TokenId)> {
        let mut all: Vec<_> = self
            .automaton
            .find_overlapping_iter(text)
            .map(|found| {
                (
                    found.start(),
                    found.end(),
                    self.tokens[found.pattern().as_usize()],
                )
            })
            .collect();
        all.sort_unstable_by_key(|&(start, end, token)| (usize::MAX - (end - start), start, token));
        let mut chosen: BTreeMap<usize, (usize, TokenId)> = BTreeMap::new();
        for (start, end, token) in all {
            let before = chosen.range(..end).next_back();
            if before.is_none_or(|(_, &(taken, _))| taken <= start) {
                chosen.insert(start, (end, token));
            }
        }
        chosen
            .into_iter()
            .map(|(start, (end, token))| (start, end, token))
            .collect()
    }
}

/// The special tokens of a vocabulary.
pub(crate) struct SpecialTokens {
    /// User-defined tokens alone: they are recognised in any text.
    text: Option<Finder>,
    /// Those and all markup.
    all: Option<Finder>,
}

impl SpecialTokens {
    pub(crate) fn new(vocab: &Vocab) -> Result<Self, BuildError> {
        let text = Finder::new(vocab, |kind| kind == TokenKind::UserDefined)?;
        let all = Finder::new(vocab, |kind| {
            kind == TokenKind::UserDefined || kind.is_special()
        })?;
        Ok(Self { text, all })
    }

    /// Cuts `text` at its special tokens; markup counts as such only if `parse_special`.
    pub(crate) fn partition<'t, E>(
        &self,
        text: &'t str,
        parse_special: bool,
        mut emit: impl FnMut(Fragment<'t>) -> Result<(), E>,
    ) -> Result<(), E> {
        let finder = if parse_special { &self.all } else { &self.text };
        let mut done = 0;
        if let Some(finder) = finder {
            for (start, end, token) in finder.occurrences(text) {
                if start > done {
                    emit(Fragment::Text(&text[done..start]))?;
                }
                emit(Fragment::Token(token))?;
                done = end;
            }
        }
        if done < text.len() {
            emit(Fragment::Text(&text[done..]))?;
        }
        Ok(())
    }
}
