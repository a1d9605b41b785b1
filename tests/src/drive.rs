//! Drives a backend directly, without the engine.

use shoal_core::{PAGE_TOKENS, Role, TokenId};
use shoal_engine::backend::{Backend, BackendError, Batch, Segment};

/// A sequence with its pages.
#[derive(Clone, Debug)]
pub struct Sequence {
    pages: Vec<u32>,
    tokens: usize,
}

impl Sequence {
    /// An empty sequence on these pages.
    pub fn new(pages: Vec<u32>) -> Self {
        Self { pages, tokens: 0 }
    }

    /// Position of its next token.
    pub fn position(&self) -> usize {
        self.tokens
    }

    /// An empty sequence on all pages of the pool, shuffled.
    pub fn scattered(backend: &dyn Backend) -> Self {
        let pages = backend.pages();
        // 7 and the number of pages have no common factor, so every page comes up once.
        assert!(!pages.is_multiple_of(7));
        Self::new((0..pages).map(|i| (i * 7 + 3) % pages).collect())
    }
}

/// One step of several sequences.
#[derive(Default)]
pub struct Step {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    segments: Vec<Segment>,
    page_table: Vec<u32>,
    logit_rows: Vec<u32>,
}

impl Step {
    /// Adds a segment of the next tokens of a sequence; all of its rows want logits.
    pub fn push(&mut self, sequence: &mut Sequence, tokens: &[TokenId], role: Role) {
        let first_row = self.tokens.len() as u32;
        let rows = first_row..first_row + tokens.len() as u32;
        let first = sequence.tokens;
        sequence.tokens += tokens.len();
        let pages = &sequence.pages[..sequence.tokens.div_ceil(PAGE_TOKENS)];
        let first_page = self.page_table.len() as u32;
        self.page_table.extend(pages);
        self.tokens.extend(tokens);
        self.positions
            .extend((first..sequence.tokens).map(|p| p as u32));
        self.logit_rows.extend(rows.clone());
        self.segments.push(Segment {
            rows,
            pages: first_page..self.page_table.len() as u32,
            role,
        });
    }

    /// The same step, of which only these rows want logits.
    #[must_use]
    pub fn wanting(self, rows: &[u32]) -> Self {
        Self {
            logit_rows: rows.to_vec(),
            ..self
        }
    }

    /// Runs it; gives the logits of every row that wants them.
    pub fn run(&self, backend: &mut dyn Backend) -> Result<Vec<f32>, BackendError> {
        let mut logits = vec![f32::NAN; self.logit_rows.len() * backend.spec().vocab];
        let batch = Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            segments: &self.segments,
            page_table: &self.page_table,
            logit_rows: &self.logit_rows,
        };
        backend.step(&batch, &mut logits)?;
        Ok(logits)
    }
}

/// Appends `tokens` to a sequence, teacher-forced; gives the logits of every row.
pub fn append(
    backend: &mut dyn Backend,
    sequence: &mut Sequence,
    tokens: &[TokenId],
    role: Role,
) -> Result<Vec<f32>, BackendError> {
    let mut step = Step::default();
    step.push(sequence, tokens, role);
    step.run(backend)
}

/// Holds a backend to this: which rows of a step want logits changes neither the logits of one that
/// does, nor those of later steps.
///
/// # Panics
/// When it does, or a step fails.
pub fn assert_rows_without_logits_change_nothing(backend: &mut dyn Backend) {
    let vocab = backend.spec().vocab;
    let tokens = |len: u32| (0..len).map(|t| 61 * t % 500 + len).collect::<Vec<_>>();
    // A draft and two prompts, then the next token of each.
    let mut run = |wanted: &[u32]| {
        let mut sequences = [0, 1, 2].map(|i| Sequence::new((4 * i..4 * i + 4).collect()));
        let mut step = Step::default();
        let parts = [(5, Role::Output), (40, Role::Prompt), (70, Role::Prompt)];
        for (sequence, (len, role)) in sequences.iter_mut().zip(parts) {
            step.push(sequence, &tokens(len), role);
        }
        let logits = step.wanting(wanted).run(backend).expect("a step");
        let mut next = Step::default();
        for sequence in &mut sequences {
            next.push(sequence, &[7], Role::Output);
        }
        (logits, next.run(backend).expect("a step"))
    };
    let (all, next) = run(&(0..115).collect::<Vec<_>>());
    for wanted in [
        &[][..],
        &[4],
        &[114],
        &[0, 1, 2, 3, 4, 44],
        &[2, 3, 10, 11, 12, 44, 50, 113, 114],
    ] {
        let (logits, after) = run(wanted);
        for (row, logits) in wanted.iter().zip(logits.chunks_exact(vocab)) {
            assert!(
                logits == &all[*row as usize * vocab..][..vocab],
                "row {row} of {wanted:?}"
            );
        }
        assert!(after == next, "after {wanted:?}");
    }
}

/// Most tokens that `append` takes at once.
pub fn max_chunk(backend: &dyn Backend) -> usize {
    backend.max_rows().min(backend.max_logit_rows())
}
