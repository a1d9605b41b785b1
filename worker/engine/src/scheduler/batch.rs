//! The planned rows, laid out for the backend.

use std::ops::Range;

use shoal_core::{Role, TokenId};

use crate::backend::{Batch, Segment};
use crate::sequence::Sequence;

/// One sequence's part of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its place among the running.
    pub(crate) index: usize,
    /// Its rows of the batch.
    pub(crate) rows: Range<usize>,
    /// Its logit rows that score prompt tokens.
    pub(crate) scoring: Range<usize>,
    /// Its logit rows to draw tokens from, after those.
    pub(crate) drawing: Range<usize>,
}

/// The memory of a batch, used again by every step.
#[derive(Debug, Default)]
pub(crate) struct BatchBuffer {
    tokens: Vec<TokenId>,
    positions: Vec<u32>,
    segments: Vec<Segment>,
    page_table: Vec<u32>,
    logit_rows: Vec<u32>,
    slots: Vec<Slot>,
    prefill_rows: usize,
    prefill_depth: u64,
}

impl BatchBuffer {
    /// Lays out the planned rows of the running sequences: those of outputs, then those of
    /// prompts.
    pub(crate) fn fill(&mut self, running: &[Box<Sequence>]) {
        self.tokens.clear();
        self.positions.clear();
        self.segments.clear();
        self.page_table.clear();
        self.logit_rows.clear();
        self.slots.clear();
        self.prefill_rows = 0;
        self.prefill_depth = 0;
        for role in [Role::Output, Role::Prompt] {
            for (index, sequence) in running.iter().enumerate() {
                if sequence.planned > 0 && sequence.role(sequence.computed) == role {
                    self.add(index, sequence, role);
                }
            }
        }
    }

    fn add(&mut self, index: usize, sequence: &Sequence, role: Role) {
        let positions = sequence.computed..sequence.computed + sequence.planned;
        if !sequence.is_decoding() {
            self.prefill_rows += sequence.planned;
            self.prefill_depth += positions.clone().map(|p| p as u64).sum::<u64>();
        }
        // They follow the last known token, which has a row of its own then.
        let drafts = sequence.drafting.rows();
        let first_row = self.tokens.len();
        let row_of = |position: usize| (first_row + position - positions.start) as u32;

        let first_page = self.page_table.len() as u32;
        self.page_table.extend_from_slice(&sequence.pages);
        self.segments.push(Segment {
            rows: row_of(positions.start)..row_of(positions.end + drafts.len()),
            pages: first_page..self.page_table.len() as u32,
            role,
        });
        self.tokens
            .extend_from_slice(&sequence.tokens()[positions.clone()]);
        self.tokens.extend_from_slice(drafts);
        self.positions
            .extend((positions.start..positions.end + drafts.len()).map(|p| p as u32));

        let first_logit = self.logit_rows.len();
        let scoring = sequence.scoring_rows(sequence.planned);
        self.logit_rows.extend(scoring.map(row_of));
        let scored = self.logit_rows.len();
        if sequence.samples_after(sequence.planned) {
            let drawing = positions.end - 1..positions.end + drafts.len();
            self.logit_rows.extend(drawing.map(row_of));
        }
        self.slots.push(Slot {
            index,
            rows: first_row..self.tokens.len(),
            scoring: first_logit..scored,
            drawing: scored..self.logit_rows.len(),
        });
    }

    /// What the backend sees.
    pub(crate) fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            segments: &self.segments,
            page_table: &self.page_table,
            logit_rows: &self.logit_rows,
        }
    }

    /// The sequences of the batch.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Rows of known tokens.
    pub(crate) fn prefill_rows(&self) -> usize {
        self.prefill_rows
    }

    /// Sum of the positions of the rows of known tokens.
    pub(crate) fn prefill_depth(&self) -> u64 {
        self.prefill_depth
    }

    /// Rows of tokens made by the last step, and of drafts.
    pub(crate) fn decode_rows(&self) -> usize {
        self.tokens.len() - self.prefill_rows
    }

    /// Rows with logits.
    pub(crate) fn logits(&self) -> usize {
        self.logit_rows.len()
    }

    /// The tokens that the rows of a slot hold.
    pub(crate) fn tokens_of(&self, slot: &Slot) -> &[TokenId] {
        &self.tokens[slot.rows.clone()]
    }
}
