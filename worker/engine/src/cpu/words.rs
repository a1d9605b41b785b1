//! A batch as words, the plan that rank 0 sends to the others.

use std::ops::Range;

use shoal_core::{PAGE_TOKENS, Role};

use crate::backend::{Batch, Segment};

/// Counts before the lists: rows, segments, pages, logit rows.
const COUNTS: usize = 4;
/// Words of a segment.
const SEGMENT: usize = 5;

/// Most words of a plan.
pub(super) fn most(rows: usize, logit_rows: usize, context: usize) -> usize {
    let pages = rows * context.div_ceil(PAGE_TOKENS);
    COUNTS + rows * (2 + SEGMENT) + pages + logit_rows
}

/// Replaces `words` by the batch.
pub(super) fn encode(batch: &Batch<'_>, words: &mut Vec<u32>) {
    words.clear();
    let counts = [
        batch.tokens.len(),
        batch.segments.len(),
        batch.page_table.len(),
        batch.logit_rows.len(),
    ];
    words.extend(counts.map(|count| count as u32));
    words.extend_from_slice(batch.tokens);
    words.extend_from_slice(batch.positions);
    for Segment { rows, pages, role } in batch.segments {
        let role = u32::from(*role == Role::Output);
        words.extend([rows.start, rows.end, pages.start, pages.end, role]);
    }
    words.extend_from_slice(batch.page_table);
    words.extend_from_slice(batch.logit_rows);
}

/// The batch that `words` are, its segments in `segments`; `None` if they are none on a pool of so
/// many pages.
pub(super) fn decode<'a>(
    words: &'a [u32],
    segments: &'a mut Vec<Segment>,
    pool: u32,
) -> Option<Batch<'a>> {
    let (counts, mut rest) = words.split_first_chunk::<COUNTS>()?;
    let [rows, count, pages, logits] = counts.map(|count| count as usize);
    let mut take = |len: usize| {
        let (list, after) = rest.split_at_checked(len)?;
        rest = after;
        Some(list)
    };
    let (tokens, positions) = (take(rows)?, take(rows)?);
    let described = take(count.checked_mul(SEGMENT)?)?;
    let (page_table, logit_rows) = (take(pages)?, take(logits)?);
    segments.clear();
    let within =
        |range: &Range<u32>, len: usize| range.start < range.end && range.end as usize <= len;
    let mut next = 0;
    for &[first, end, first_page, end_page, role] in described.as_chunks::<SEGMENT>().0 {
        let segment = Segment {
            rows: first..end,
            pages: first_page..end_page,
            role: if role == 0 {
                Role::Prompt
            } else {
                Role::Output
            },
        };
        if first != next || !within(&segment.rows, rows) || !within(&segment.pages, pages) {
            return None;
        }
        let reach = positions[first as usize] as usize + segment.rows.len();
        if reach.div_ceil(PAGE_TOKENS) > segment.pages.len() {
            return None;
        }
        next = end;
        segments.push(segment);
    }
    let ascending = logit_rows.is_sorted_by(|row, next| row < next);
    let whole = rest.is_empty() && next as usize == rows;
    let good = whole && ascending && logit_rows.iter().all(|&row| (row as usize) < rows);
    let good = good && page_table.iter().all(|&page| page < pool);
    good.then_some(Batch {
        tokens,
        positions,
        segments,
        page_table,
        logit_rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: u32 = 5;

    fn segments() -> [Segment; 2] {
        [
            Segment {
                rows: 0..3,
                pages: 0..2,
                role: Role::Prompt,
            },
            Segment {
                rows: 3..4,
                pages: 2..3,
                role: Role::Output,
            },
        ]
    }

    fn words() -> Vec<u32> {
        let mut words = vec![9; 100];
        let batch = Batch {
            tokens: &[5, 6, 7, 8],
            positions: &[31, 32, 33, 0],
            segments: &segments(),
            page_table: &[4, 2, 1],
            logit_rows: &[2, 3],
        };
        encode(&batch, &mut words);
        words
    }

    #[test]
    fn a_batch_comes_back() {
        let (words, mut decoded) = (words(), Vec::new());
        assert!(words.len() <= most(4, 2, 64));
        let batch = decode(&words, &mut decoded, POOL).unwrap();
        assert_eq!(batch.tokens, [5, 6, 7, 8]);
        assert_eq!(batch.positions, [31, 32, 33, 0]);
        assert_eq!(batch.segments, segments());
        assert_eq!(batch.page_table, [4, 2, 1]);
        assert_eq!(batch.logit_rows, [2, 3]);
    }

    #[test]
    fn other_words_are_none() {
        let good = words();
        let mut decoded = Vec::new();
        for len in 0..good.len() {
            assert!(decode(&good[..len], &mut decoded, POOL).is_none(), "{len}");
        }
        let longer = [&good[..], &[1]].concat();
        assert!(decode(&longer, &mut decoded, POOL).is_none());
        // Each segment's rows and pages, and a logit row, out of bounds.
        for at in [13, 15, 18, 20, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] = 5;
            assert!(decode(&bad, &mut decoded, POOL).is_none(), "{at}");
        }
        // Rows that no segment has, positions past its pages, and a page past the pool.
        for (at, word) in [(12, 1), (17, 2), (8, 62), (22, POOL)] {
            let mut bad = good.clone();
            bad[at] = word;
            assert!(decode(&bad, &mut decoded, POOL).is_none(), "{at}");
        }
        // The same logit row twice.
        let mut bad = good.clone();
        bad[good.len() - 2] = good[good.len() - 1];
        assert!(decode(&bad, &mut decoded, POOL).is_none());
        let mut bad = good;
        bad[1] = u32::MAX;
        assert!(decode(&bad, &mut decoded, POOL).is_none());
    }
}
