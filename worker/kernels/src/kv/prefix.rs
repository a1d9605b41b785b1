//! Which blocks of rows begin with the same pages: they attend to those together.

use std::ops::Range;

use crate::attention::{PAGE, SPAN};

/// Fewer blocks have too few queries for it.
const LEAST_BLOCKS: usize = 3;
/// Fewer spans come from the cache while memory brings what is not in common.
const LEAST_SPANS: usize = 8;

/// Blocks with a common beginning, whose queries one call takes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Family {
    /// Their places in the order.
    pub(super) members: Range<usize>,
    /// Spans that all of them begin with.
    pub(super) spans: usize,
    /// Queries of a head, at most.
    pub(super) queries: usize,
}

/// Puts blocks with a common beginning beside each other in `order`, and finds the families among
/// them. `pages` are those of the spans that every row of a block sees whole, `queries` those of one
/// head, of which a call takes `most`.
pub(super) fn families<'a>(
    order: &mut [usize],
    pages: impl Fn(usize) -> &'a [u32],
    queries: impl Fn(usize) -> usize,
    most: usize,
    found: &mut Vec<Family>,
) {
    order.sort_unstable_by_key(|&block| pages(block));
    let order = &*order;
    let common = |a: usize, b: usize| {
        let pairs = pages(a).iter().zip(pages(b));
        pairs.take_while(|(a, b)| a == b).count() / (SPAN / PAGE)
    };
    // The family from a place on that spares the most reading, and how many spans of it.
    let best = |first: usize| {
        let (mut spans, mut count, mut saved) = (usize::MAX, 0, 0);
        let mut best = None;
        for (place, &block) in order.iter().enumerate().skip(first) {
            count += queries(block);
            if place > first {
                spans = spans.min(common(order[place - 1], block));
            }
            if count > most || spans < LEAST_SPANS {
                break;
            }
            let others = place - first;
            if others + 1 >= LEAST_BLOCKS && spans * others >= saved {
                saved = spans * others;
                best = Some(Family {
                    members: first..place + 1,
                    spans,
                    queries: count,
                });
            }
        }
        (best, saved)
    };
    let mut first = 0;
    while first < order.len() {
        match best(first) {
            // Whoever would cost the next ones a longer beginning stays alone.
            (Some(family), saved) if best(first + 1).1 <= saved => {
                first = family.members.end;
                found.push(family);
            }
            _ => first += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tables: &[&[u32]], most: usize) -> Vec<(Vec<usize>, usize)> {
        let mut order: Vec<usize> = (0..tables.len()).collect();
        let mut found = Vec::new();
        families(&mut order, |block| tables[block], |_| 3, most, &mut found);
        let members = |family: &Family| {
            let mut members = order[family.members.clone()].to_vec();
            members.sort_unstable();
            (members, family.spans)
        };
        found.iter().map(members).collect()
    }

    /// A table that begins with so many pages of a family's.
    fn begins(family: u32, pages: u32, last: u32) -> Vec<u32> {
        let own = 1000 + last;
        (0..pages).map(|i| 100 * family + i).chain([own]).collect()
    }

    fn slices(tables: &[Vec<u32>]) -> Vec<&[u32]> {
        tables.iter().map(Vec::as_slice).collect()
    }

    #[test]
    fn common_beginnings_make_families() {
        let of = |family, i| begins(family, 18 + 2 * (i % 2), i);
        let tables: Vec<_> = (0..8).map(|i| of(i % 2, i / 2)).collect();
        let expected = [(vec![0, 2, 4, 6], 9), (vec![1, 3, 5, 7], 9)];
        assert_eq!(found(&slices(&tables), 32), expected);
        // Two of each, or fewer spans in common, are none.
        assert_eq!(found(&slices(&tables[..4]), 32), []);
        let short: Vec<_> = (0..4).map(|i| begins(0, 15, i)).collect();
        assert_eq!(found(&slices(&short), 32), []);
        assert_eq!(found(&[], 32), []);
        assert_eq!(found(&[&[], &[], &[]], 32), []);
    }

    #[test]
    fn a_call_takes_so_many_queries() {
        let table = begins(0, 16, 0);
        let tables = [&table[..]; 8];
        assert_eq!(found(&tables, 8), []);
        let members: Vec<usize> = found(&tables, 11).iter().map(|(m, _)| m.len()).collect();
        assert_eq!(members, [3, 3]);
    }

    #[test]
    fn a_shorter_beginning_is_worth_a_member_of_many_only() {
        // Thirteen spans of four against nine of five: four stay, and the short one is alone.
        let mut tables: Vec<_> = (0..4).map(|i| begins(0, 26, i)).collect();
        tables.push(begins(0, 18, 4));
        assert_eq!(found(&slices(&tables), 32), [(vec![0, 1, 2, 3], 13)]);
        // Ten spans of five are more than thirteen of four.
        tables[4] = begins(0, 20, 4);
        assert_eq!(found(&slices(&tables), 32), [(vec![0, 1, 2, 3, 4], 10)]);
        // One that comes first in the order.
        tables[4] = [begins(0, 18, 0), vec![0; 12]].concat();
        tables[4][18] = 0;
        assert_eq!(found(&slices(&tables), 32), [(vec![0, 1, 2, 3], 13)]);
    }
}
