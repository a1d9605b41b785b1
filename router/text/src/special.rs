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
    /// that overlap them, wherever they start, then smaller ids over greater ones.
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
        all.sort_unstable_by_key(|&(start, end, token)| (usize::MAX - (end - start), token, start));
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shoal_proto::worker::TokenizerBundle;
    use std::convert::Infallible;

    /// Tokens and their types: 3 is markup, 4 is text.
    fn special(tokens: &[(String, u32)]) -> SpecialTokens {
        let bundle = TokenizerBundle {
            tokens: tokens.iter().map(|(text, _)| text.clone()).collect(),
            token_types: tokens.iter().map(|&(_, ty)| ty).collect(),
            ..Default::default()
        };
        let vocab = Vocab::new(&bundle, |_, _| {}).expect("valid");
        SpecialTokens::new(&vocab).expect("searchable")
    }

    /// Texts between bars, tokens as their numbers.
    fn cut(special: &SpecialTokens, text: &str, parse_special: bool) -> String {
        let mut shown = String::new();
        let done: Result<(), Infallible> = special.partition(text, parse_special, |fragment| {
            match fragment {
                Fragment::Text(text) => shown.push_str(&format!("|{text}|")),
                Fragment::Token(token) => shown.push_str(&token.to_string()),
            }
            Ok(())
        });
        assert_eq!(done, Ok(()));
        shown
    }

    /// One token after the other, the longest first, each taking what the others left.
    fn naive(tokens: &[(String, u32)], text: &str, parse_special: bool) -> String {
        let mut order: Vec<usize> = (0..tokens.len())
            .filter(|&token| parse_special || tokens[token].1 == 4)
            .collect();
        order.sort_by_key(|&token| (usize::MAX - tokens[token].0.len(), token));
        let mut parts: Vec<Result<usize, &str>> = vec![Err(text)];
        for token in order {
            parts = parts
                .into_iter()
                .flat_map(|part| match part {
                    Ok(token) => vec![Ok(token)],
                    Err(text) => {
                        let mut cut = Vec::new();
                        for (at, text) in text.split(tokens[token].0.as_str()).enumerate() {
                            if at > 0 {
                                cut.push(Ok(token));
                            }
                            cut.push(Err(text));
                        }
                        cut
                    }
                })
                .collect();
        }
        let shown = |part| match part {
            Ok(token) => format!("{token}"),
            Err("") => String::new(),
            Err(text) => format!("|{text}|"),
        };
        parts.into_iter().map(shown).collect()
    }

    #[test]
    fn longer_tokens_win_even_over_earlier_ones() {
        let special = special(&[("ab".into(), 3), ("bcd".into(), 3), ("x".into(), 4)]);
        assert_eq!(cut(&special, "abcdx", true), "|a|12");
        assert_eq!(cut(&special, "abcdx", false), "|abcd|2");
        assert_eq!(cut(&special, "", true), "");
    }

    proptest! {
        #[test]
        fn partitioning_equals_splitting_by_one_token_after_the_other(
            tokens in prop::collection::btree_map("[abc]{1,4}", 3u32..5, 0..6),
            text in "[abc]{0,30}",
            parse_special: bool,
        ) {
            let tokens: Vec<(String, u32)> = tokens.into_iter().collect();
            let special = special(&tokens);
            prop_assert_eq!(
                cut(&special, &text, parse_special),
                naive(&tokens, &text, parse_special)
            );
        }
    }
}
