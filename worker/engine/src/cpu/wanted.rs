//! What the last layer leaves out: nobody reads what it makes of a row whose logits are not wanted,
//! but its key and value.

use shoal_kernels::kv::Run;

use super::CpuBackend;
use crate::backend::{Batch, Segment};

/// Consecutive rows of a segment.
fn run<'a>(batch: &Batch<'a>, segment: &Segment, first: u32, rows: usize) -> Run<'a> {
    Run {
        rows,
        position: batch.positions[first as usize] as usize,
        pages: &batch.page_table[segment.pages.start as usize..segment.pages.end as usize],
    }
}

/// All rows of a batch.
pub(super) fn all<'a>(batch: &Batch<'a>) -> impl Iterator<Item = Run<'a>> {
    let batch = *batch;
    let segments = batch.segments.iter();
    segments.map(move |segment| run(&batch, segment, segment.rows.start, segment.rows.len()))
}

/// Those whose logits are wanted, one after the other.
fn wanted<'a>(batch: &Batch<'a>) -> impl Iterator<Item = Run<'a>> {
    let (batch, mut picked) = (*batch, batch.logit_rows);
    batch.segments.iter().flat_map(move |segment| {
        let (here, rest) = picked.split_at(picked.partition_point(|&row| row < segment.rows.end));
        picked = rest;
        let consecutive = here.chunk_by(|row, next| row + 1 == *next);
        consecutive.map(move |rows| run(&batch, segment, rows[0], rows.len()))
    })
}

impl CpuBackend {
    /// Goes on with the rows whose logits are wanted, which become the first ones.
    pub(super) fn keep_wanted(&mut self, batch: &Batch<'_>) {
        let picked = batch.logit_rows;
        if picked.len() == self.plan.rows() {
            return;
        }
        let s = &mut self.scratch;
        let (width, words) = (self.spec.d_model, self.heads.query_words());
        // Ascending, so a row is copied before its place is taken.
        for (to, from) in picked.iter().map(|&row| row as usize).enumerate() {
            s.residual
                .copy_within(from * width..(from + 1) * width, to * width);
            s.queries
                .copy_within(from * words..(from + 1) * words, to * words);
        }
        for inputs in [&mut s.attn_out, &mut s.ffn_in, &mut s.ffn_out] {
            inputs.set_prompts(s.head.prompts());
        }
        self.plan.set(wanted(batch));
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::Role;

    use super::*;

    #[test]
    fn wanted_rows_keep_their_places() {
        let segment = |rows, pages| Segment {
            rows,
            pages,
            role: Role::Prompt,
        };
        let segments = [
            segment(0..2, 0..1),
            segment(2..7, 1..3),
            segment(7..8, 3..4),
        ];
        let batch = Batch {
            tokens: &[0; 8],
            positions: &[5, 6, 30, 31, 32, 33, 34, 9],
            segments: &segments,
            page_table: &[4, 2, 3, 1],
            logit_rows: &[1, 2, 3, 6],
        };
        let places = |runs: &mut dyn Iterator<Item = Run<'_>>| {
            runs.map(|r| (r.rows, r.position, r.pages.to_vec()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            places(&mut wanted(&batch)),
            [(1, 6, vec![4]), (2, 30, vec![2, 3]), (1, 34, vec![2, 3])]
        );
        let every = Batch {
            logit_rows: &[0, 1, 2, 3, 4, 5, 6, 7],
            ..batch
        };
        assert_eq!(places(&mut wanted(&every)), places(&mut all(&batch)));
    }
}
