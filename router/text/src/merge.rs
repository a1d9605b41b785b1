//! The merge loop of byte-pair encoding: always the most urgent pair of neighbours next,
//! the leftmost among equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

const NONE: u32 = u32::MAX;

/// A pair of neighbours that may become one symbol.
#[derive(Clone, Copy)]
pub(crate) struct Merge<S> {
    /// Smaller is sooner.
    pub(crate) priority: u32,
    /// What the pair becomes.
    pub(crate) symbol: S,
}

struct Node<S> {
    symbol: S,
    next: u32,
    prev: u32,
    /// The merge with the next node, if there is one.
    merge: Option<Merge<S>>,
}

/// Merges sequences of symbols; keeps its memory from one sequence to the next.
pub(crate) struct Merger<S> {
    nodes: Vec<Node<S>>,
    /// (priority, position), packed so that a plain comparison orders them.
    queue: BinaryHeap<Reverse<u64>>,
}

impl<S: Copy> Merger<S> {
    pub(crate) fn new() -> Self {
        Self {
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
        }
    }

    /// Merges `symbols` (fewer than 2³² of them) as far as `pair` allows and hands the result
    /// to `emit`, from left to right.
    ///
    /// O(n log n): an entry of the queue is stale when its node has another merge by now.
    pub(crate) fn run<E>(
        &mut self,
        symbols: impl Iterator<Item = S>,
        pair: impl Fn(S, S) -> Option<Merge<S>>,
        mut emit: impl FnMut(S) -> Result<(), E>,
    ) -> Result<(), E> {
        self.nodes.clear();
        self.queue.clear();
        for (symbol, at) in symbols.zip(0u32..) {
            self.nodes.push(Node {
                symbol,
                next: at + 1,
                prev: at.checked_sub(1).unwrap_or(NONE),
                merge: None,
            });
        }
        match self.nodes.last_mut() {
            Some(last) => last.next = NONE,
            None => return Ok(()),
        }
        for at in 0..self.nodes.len() - 1 {
            self.consider(at as u32, &pair);
        }
        while let Some(Reverse(entry)) = self.queue.pop() {
            let (priority, at) = ((entry >> 32) as u32, entry as u32);
            let node = &mut self.nodes[at as usize];
            let Some(merge) = node.merge.filter(|merge| merge.priority == priority) else {
                continue;
            };
            let right = node.next;
            node.symbol = merge.symbol;
            let absorbed = &mut self.nodes[right as usize];
            absorbed.merge = None;
            let next = absorbed.next;
            self.nodes[at as usize].next = next;
            if let Some(next) = self.nodes.get_mut(next as usize) {
                next.prev = at;
            }
            self.consider(at, &pair);
            self.consider(self.nodes[at as usize].prev, &pair);
        }
        let mut at = 0;
        while let Some(node) = self.nodes.get(at as usize) {
            emit(node.symbol)?;
            at = node.next;
        }
        Ok(())
    }

    /// Looks up the merge of the node at `at` with its right neighbour and queues it.
    fn consider(&mut self, at: u32, pair: &impl Fn(S, S) -> Option<Merge<S>>) {
        let Some(node) = self.nodes.get(at as usize) else {
            return;
        };
        let merge = self
            .nodes
            .get(node.next as usize)
            .and_then(|right| pair(node.symbol, right.symbol));
        if let Some(merge) = merge {
            self.queue
                .push(Reverse(u64::from(merge.priority) << 32 | u64::from(at)));
        }
        self.nodes[at as usize].merge = merge;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    /// Symbols are digits; two of them merge by a table of (left, right) → priority, and
    /// make the digit (left + right) mod 8.
    fn pair(table: &[Option<u32>], left: u8, right: u8) -> Option<Merge<u8>> {
        let priority = table[usize::from(left) * 8 + usize::from(right)]?;
        Some(Merge {
            priority,
            symbol: (left + right) % 8,
        })
    }

    fn naive(table: &[Option<u32>], mut symbols: Vec<u8>) -> Vec<u8> {
        loop {
            let best = symbols
                .windows(2)
                .enumerate()
                .filter_map(|(at, pair_at)| Some((pair(table, pair_at[0], pair_at[1])?, at)))
                .min_by_key(|(merge, at)| (merge.priority, *at));
            let Some((merge, at)) = best else {
                return symbols;
            };
            symbols[at] = merge.symbol;
            symbols.remove(at + 1);
        }
    }

    proptest! {
        #[test]
        fn merging_equals_a_search_for_the_best_pair(
            table in prop::collection::vec(prop::option::of(0u32..20), 64),
            sequences in prop::collection::vec(prop::collection::vec(0u8..8, 0..40), 1..4),
        ) {
            let mut merger = Merger::new();
            for symbols in sequences {
                let mut merged = Vec::new();
                let done: Result<(), Infallible> = merger.run(
                    symbols.iter().copied(),
                    |left, right| pair(&table, left, right),
                    |symbol| { merged.push(symbol); Ok(()) },
                );
                prop_assert_eq!(done, Ok(()));
                prop_assert_eq!(merged, naive(&table, symbols));
            }
        }
    }
}
