//! Drafts that were made elsewhere and came late: anchored tries.

use shoal_core::{TokenId, draft_anchor};

/// Most nodes of a draft.
pub const MAX_DRAFT_NODES: usize = 64;

/// Guesses at the tokens of a sequence from an output position on, as a trie. Whatever is in
/// it, it changes no token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PushedDraft {
    /// Output position of the first guess.
    pub base: u32,
    /// [`draft_anchor`] of the text before that position.
    pub anchor: u32,
    /// Tokens of the nodes, every parent before its children, better children first.
    pub tokens: Vec<TokenId>,
    /// Of each node: 0 for a first guess, else one more than the index of its parent. Empty
    /// for a chain.
    pub parents: Vec<u32>,
}

/// What a pushed draft is worth now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Landing {
    /// It begins after the text's end: perhaps it counts later.
    Early,
    /// It disagrees with the text, or ends before it does.
    Useless,
    /// Its best path was written out.
    Fresh,
}

impl PushedDraft {
    fn parent(&self, node: usize) -> usize {
        if self.parents.is_empty() {
            return node;
        }
        self.parents.get(node).map_or(usize::MAX, |&p| p as usize)
    }

    fn child(&self, parent: usize, wanted: impl Fn(TokenId) -> bool) -> Option<usize> {
        let mut nodes = self.tokens.iter().enumerate().take(MAX_DRAFT_NODES);
        nodes
            .find(|&(node, &token)| {
                // A parent comes before its children; nothing else can be walked in a circle.
                node >= parent && self.parent(node) == parent && wanted(token)
            })
            .map(|(node, _)| node + 1)
    }

    /// Walks down along the output that came since, and writes the best of what is left to
    /// `path`, at most `most` tokens. `text` is the prompt of `prompt` tokens and the output.
    pub(crate) fn land(
        &self,
        text: &[TokenId],
        prompt: usize,
        most: usize,
        path: &mut Vec<TokenId>,
    ) -> Landing {
        let start = prompt + self.base as usize;
        if start > text.len() {
            return Landing::Early;
        }
        if draft_anchor(&text[..start]) != self.anchor {
            return Landing::Useless;
        }
        let mut node = 0;
        for &token in &text[start..] {
            match self.child(node, |guess| guess == token) {
                Some(child) => node = child,
                None => return Landing::Useless,
            }
        }
        while path.len() < most {
            let Some(child) = self.child(node, |_| true) else {
                break;
            };
            path.push(self.tokens[child - 1]);
            node = child;
        }
        if path.is_empty() {
            Landing::Useless
        } else {
            Landing::Fresh
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: [TokenId; 6] = [9, 8, 7, 1, 2, 3];
    const PROMPT: usize = 3;

    fn draft(base: u32, tokens: &[TokenId], parents: &[u32]) -> PushedDraft {
        PushedDraft {
            base,
            anchor: draft_anchor(&TEXT[..(PROMPT + base as usize).min(TEXT.len())]),
            tokens: tokens.to_vec(),
            parents: parents.to_vec(),
        }
    }

    fn land(draft: &PushedDraft) -> (Landing, Vec<TokenId>) {
        let mut path = Vec::new();
        let landing = draft.land(&TEXT, PROMPT, 4, &mut path);
        (landing, path)
    }

    #[test]
    fn a_chain_lands_at_the_end_or_is_caught_up_with() {
        let fresh = |path: &[TokenId]| (Landing::Fresh, path.to_vec());
        assert_eq!(land(&draft(3, &[4, 5], &[])), fresh(&[4, 5]));
        assert_eq!(land(&draft(1, &[2, 3, 4], &[])), fresh(&[4]));
        assert_eq!(land(&draft(3, &[4; 9], &[])), fresh(&[4; 4]));
        for useless in [
            draft(1, &[2, 3], &[]),
            draft(1, &[2, 4, 4], &[]),
            draft(3, &[], &[]),
        ] {
            assert_eq!(land(&useless), (Landing::Useless, vec![]));
        }
        assert_eq!(land(&draft(4, &[5], &[])), (Landing::Early, vec![]));
    }

    #[test]
    fn a_trie_is_walked_down() {
        // Position 1: 5 or 2; after 2: 6 or 3; after 3: 4, then 5.
        let trie = draft(1, &[5, 2, 6, 3, 4, 5], &[0, 0, 2, 2, 4, 5]);
        assert_eq!(land(&trie), (Landing::Fresh, vec![4, 5]));
    }

    #[test]
    fn a_wrong_anchor_is_no_draft() {
        let mut wrong = draft(3, &[4], &[]);
        wrong.anchor ^= 1;
        assert_eq!(land(&wrong), (Landing::Useless, vec![]));
    }

    #[test]
    fn nonsense_ends() {
        for parents in [&[7, 7, 7][..], &[1, 1, 1], &[3, 2, 1], &[0], &[u32::MAX; 3]] {
            let (_, path) = land(&draft(3, &[4, 5, 6], parents));
            assert!(path.len() <= 3);
        }
    }
}
