//! What is measured: steps of some shape.

use shoal_core::{PAGE_TOKENS, Role};
use shoal_engine::backend::{Batch, Segment};

/// Sequences of a step that are alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    /// How many.
    pub(super) sequences: usize,
    /// Position of the first row of each.
    pub(super) position: usize,
    /// Rows of each.
    pub(super) rows: usize,
    /// Of outputs, a token and its draft, all rows want logits; of prompts, the last.
    pub(super) role: Role,
    /// First pages that all have in common.
    pub(super) shared: usize,
}

/// Steps, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) steps: Vec<Vec<Group>>,
}

const BATCHES: [usize; 5] = [1, 4, 8, 16, 32];
const VERIFIED: [usize; 3] = [2, 4, 8];
const CONTEXTS: [usize; 3] = [64, 256, 1024];
const PREFILLS: [usize; 3] = [128, 512, LONGEST];
/// The longest context, of one sequence.
const LONGEST: usize = 2048;

fn decode(sequences: usize, context: usize) -> Group {
    Group {
        sequences,
        position: context - 1,
        rows: 1,
        role: Role::Output,
        shared: 0,
    }
}

/// A token of a sequence and a draft of what follows, so many rows in all.
fn verify(rows: usize, context: usize) -> Group {
    Group {
        rows,
        ..decode(1, context)
    }
}

fn prefill(position: usize, rows: usize) -> Group {
    Group {
        sequences: 1,
        position,
        rows,
        role: Role::Prompt,
        shared: 0,
    }
}

/// Every case for a model with this context, prompts in chunks of so many rows.
pub(super) fn all(context: usize, chunk: usize) -> Vec<Case> {
    let one = |name: String, groups: Vec<Group>| Case {
        name,
        steps: vec![groups],
    };
    let mut cases = Vec::new();
    for tokens in PREFILLS {
        let chunks = (0..tokens).step_by(chunk);
        cases.push(Case {
            name: format!("prefill {tokens}"),
            steps: chunks
                .map(|first| vec![prefill(first, chunk.min(tokens - first))])
                .collect(),
        });
    }
    let grid = CONTEXTS.iter().flat_map(|&c| BATCHES.map(|b| (b, c)));
    for (sequences, context) in grid.chain([(1, LONGEST)]) {
        let name = format!("decode {sequences} x {context}");
        cases.push(one(name, vec![decode(sequences, context)]));
    }
    for rows in VERIFIED {
        let name = format!("verify {rows} rows at 256");
        cases.push(one(name, vec![verify(rows, 256)]));
    }
    let mixed = vec![decode(8, 256), prefill(0, 128)];
    cases.push(one("decode 8 x 256, prefill 128".to_owned(), mixed));
    for shared in [160, 1024] {
        let group = Group {
            shared: shared / PAGE_TOKENS,
            ..decode(32, shared + 96)
        };
        cases.push(one(
            format!("decode 32 x {}, {shared} shared", shared + 96),
            vec![group],
        ));
    }
    cases.retain(|case| {
        let groups = case.steps.iter().flatten();
        groups.map(Group::end).max() <= Some(context)
    });
    cases
}

impl Group {
    fn end(&self) -> usize {
        self.position + self.rows
    }

    /// Rows of a sequence that want logits.
    fn wanted(&self) -> usize {
        match self.role {
            Role::Output => self.rows,
            Role::Prompt => 1,
        }
    }

    /// Pages of a sequence.
    fn pages(&self) -> usize {
        self.end().div_ceil(PAGE_TOKENS)
    }

    /// Tokens whose keys and values all of them read at least once.
    pub(super) fn tokens(&self) -> usize {
        let shared = self.shared * PAGE_TOKENS;
        shared + self.sequences * (self.end() - shared)
    }

    /// Tokens that their rows attend to, in all.
    pub(super) fn attended(&self) -> usize {
        self.attended_by(self.rows)
    }

    /// Tokens that the rows which want logits attend to, in all.
    pub(super) fn attended_by_wanted(&self) -> usize {
        self.attended_by(self.wanted())
    }

    /// Tokens that the last `rows` of each attend to, in all.
    fn attended_by(&self, rows: usize) -> usize {
        let up_to = |end: usize| end * (end + 1) / 2;
        self.sequences * (up_to(self.end()) - up_to(self.end() - rows))
    }
}

/// A step, laid out for the backend.
#[derive(Debug, Default)]
pub(super) struct Layout {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    segments: Vec<Segment>,
    page_table: Vec<u32>,
    logit_rows: Vec<u32>,
    pages: u32,
}

impl Layout {
    pub(super) fn new(groups: &[Group], vocab: usize) -> Self {
        let mut layout = Self::default();
        for group in groups {
            let first = layout.pages;
            layout.pages += group.shared as u32;
            for sequence in 0..group.sequences {
                let pages = layout.page_table.len() as u32;
                let own = (group.pages() - group.shared) as u32;
                layout.page_table.extend(first..first + group.shared as u32);
                layout.page_table.extend(layout.pages..layout.pages + own);
                layout.pages += own;
                let row = layout.tokens.len() as u32;
                let positions = group.position..group.end();
                let token = |position| (sequence * 331 + position * 7919) % vocab;
                layout
                    .tokens
                    .extend(positions.clone().map(|p| token(p) as u32));
                layout.positions.extend(positions.map(|p| p as u32));
                layout.segments.push(Segment {
                    rows: row..layout.tokens.len() as u32,
                    pages: pages..layout.page_table.len() as u32,
                    role: group.role,
                });
                let end = layout.tokens.len() as u32;
                layout.logit_rows.extend(end - group.wanted() as u32..end);
            }
        }
        layout
    }

    pub(super) fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            segments: &self.segments,
            page_table: &self.page_table,
            logit_rows: &self.logit_rows,
        }
    }

    /// The same on pages that begin with `page`.
    pub(super) fn moved_to(mut self, page: u32) -> Self {
        self.page_table.iter_mut().for_each(|p| *p += page);
        self
    }

    /// Pages that it takes.
    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    pub(super) fn rows(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn logits(&self) -> usize {
        self.logit_rows.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_pages_for_every_row_and_shares_those_it_should() {
        let group = Group {
            sequences: 3,
            position: 70,
            rows: 2,
            role: Role::Prompt,
            shared: 2,
        };
        let layout = Layout::new(&[group, prefill(0, 5)], 50);
        assert_eq!(layout.page_table, [0, 1, 2, 0, 1, 3, 0, 1, 4, 5]);
        assert_eq!(layout.pages(), 6);
        assert_eq!(layout.logit_rows, [1, 3, 5, 10]);
        assert_eq!(layout.positions, [70, 71, 70, 71, 70, 71, 0, 1, 2, 3, 4]);
        assert!(layout.tokens.iter().all(|&token| token < 50));
        assert_eq!(group.tokens(), 64 + 3 * 8);
        assert_eq!(group.attended(), 3 * (71 + 72));
        assert_eq!(group.attended_by_wanted(), 3 * 72);

        let layout = Layout::new(&[verify(3, 8)], 50);
        assert_eq!(layout.positions, [7, 8, 9]);
        assert_eq!(layout.logit_rows, [0, 1, 2]);
        assert_eq!(verify(3, 8).attended_by_wanted(), 8 + 9 + 10);
    }

    #[test]
    fn cases_stay_within_the_context() {
        assert!(all(8192, 256).len() > all(512, 256).len());
        assert!(all(512, 256).iter().any(|case| case.name == "prefill 512"));
        assert_eq!(all(8192, 256)[1].steps.len(), 2);
    }
}
