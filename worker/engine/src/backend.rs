//! What a backend must do: run one step over a batch of rows.

use std::ops::Range;

use shoal_core::{Class, Role};

use shoal_collective::CollectiveError;

use crate::cpu::ShardError;
use crate::spec::ModelSpec;

/// Equal ids give equal logits, bit for bit: a hash of the weights, the numerics version of
/// the code, and the settings that change a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NumericsId(pub [u8; 32]);

/// The rows of one step. A row is one token of one sequence at one position.
///
/// Every row's key and value are stored before any row attends, so a segment may attend to
/// rows of an earlier segment of the same sequence in the same batch.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Position of each row in its sequence, from 0.
    pub positions: &'a [u32],
    /// Runs of consecutive positions of one sequence, in row order, covering every row once:
    /// those of outputs, then those of prompts.
    pub segments: &'a [Segment],
    /// KV pages of all sequences, one after the other; `Segment::pages` points in here.
    pub page_table: &'a [u32],
    /// Rows whose logits are wanted, each once, ascending.
    pub logit_rows: &'a [u32],
}

impl Batch<'_> {
    /// Whether it has at most so many rows, and so many of them want logits.
    ///
    /// # Errors
    /// [`BackendError::BatchTooLarge`] if not.
    pub fn fits(&self, rows: usize, logit_rows: usize) -> Result<(), BackendError> {
        let limits = [
            (self.tokens.len(), rows),
            (self.logit_rows.len(), logit_rows),
        ];
        match limits.into_iter().find(|(rows, max)| rows > max) {
            Some((rows, max)) => Err(BackendError::BatchTooLarge { rows, max }),
            None => Ok(()),
        }
    }

    /// How many rows are those of outputs; `None` if prompts come before one.
    pub fn outputs(&self) -> Option<usize> {
        let is_output = |segment: &&Segment| segment.role == Role::Output;
        let outputs = self.segments.iter().take_while(is_output);
        let rows = outputs
            .clone()
            .last()
            .map_or(0, |last| last.rows.end as usize);
        let mut rest = self.segments[outputs.count()..].iter();
        rest.all(|segment| segment.role == Role::Prompt)
            .then_some(rows)
    }
}

/// Consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The rows of the batch.
    pub rows: Range<u32>,
    /// Where the sequence's pages stand in `Batch::page_table`. Position p lives in page
    /// `p / PAGE_TOKENS` of them, at offset `p % PAGE_TOKENS`; they reach past the last row.
    pub pages: Range<u32>,
    /// All rows of a segment have one role; it decides their numeric path.
    pub role: Role,
}

/// A failed step. The KV pages of its sequences are undefined from their first row on.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The batch is larger than the backend was built for.
    #[error("batch has {rows} rows, the backend takes {max}")]
    BatchTooLarge {
        /// Rows of the batch.
        rows: usize,
        /// Rows that fit.
        max: usize,
    },
    /// The rows of a batch are not in order.
    #[error("a batch has rows of prompts before rows of outputs")]
    Order,
    /// The weights do not match the spec, or are of an unsupported type.
    #[error("tensor {tensor}: {reason}")]
    Weights {
        /// Name in the file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernels cannot split a dimension of the model into whole vectors.
    #[error("{what} is {width}, not a multiple of {multiple}")]
    Width {
        /// The dimension.
        what: &'static str,
        /// Its size.
        width: usize,
        /// What must divide it.
        multiple: usize,
    },
    /// Too many query heads share a key-value head.
    #[error("{group} query heads share a key-value head, at most {max} can")]
    QueryGroup {
        /// How many share one.
        group: usize,
        /// How many can.
        max: usize,
    },
    /// Weights and KV pool do not fit.
    #[error("{needed} bytes are needed for {what}, {available} are available")]
    OutOfMemory {
        /// What they are for.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// The model cannot be split so.
    #[error(transparent)]
    Shards(#[from] ShardError),
    /// The seat in a group is not the rank's.
    #[error("seat {seat} of {seats} is not for rank {rank} of {world}")]
    Seat {
        /// The rank.
        rank: usize,
        /// Ranks of its split.
        world: usize,
        /// The seat.
        seat: usize,
        /// Seats of the group.
        seats: usize,
    },
    /// A rank of the group failed, and with it the keys and values that it holds.
    #[error("the group of ranks is broken")]
    Group(#[from] CollectiveError),
    /// This rank is in no group.
    #[error("the ranks have not met")]
    NoGroup,
    /// What rank 0 sent is no step of this model.
    #[error("rank 0 sent no plan of a step")]
    Plan,
    /// The device or library under the backend failed.
    #[error("the device failed")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl BackendError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Device(_) | Self::NoGroup => Class::Retry,
            Self::Group(error) => error.class(),
            Self::Shards(error) => error.class(),
            _ => Class::Fatal,
        }
    }

    /// Whether the whole KV pool is lost with the step.
    pub fn loses_pages(&self) -> bool {
        matches!(self, Self::Group(_) | Self::NoGroup)
    }
}

/// Runs the model. One backend owns its weights and its KV pool.
pub trait Backend: Send {
    /// Field name: `cpu`, `candle`.
    fn name(&self) -> &'static str;

    /// The shape of the model.
    fn spec(&self) -> &ModelSpec;

    /// See [`NumericsId`].
    fn numerics_id(&self) -> NumericsId;

    /// Pages in the KV pool; page numbers are below this.
    fn pages(&self) -> u32;

    /// Most rows of one step.
    fn max_rows(&self) -> usize;

    /// Most rows of one step that want logits.
    fn max_logit_rows(&self) -> usize;

    /// Processes that run a step together.
    fn ranks(&self) -> usize {
        1
    }

    /// Whether it can run a step, as far as is known without running one.
    ///
    /// # Errors
    /// As `step`.
    fn intact(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Makes it able to run a step again, with an empty KV pool, after an error that
    /// [loses the pages](BackendError::loses_pages). `false` after a moment if it waits for
    /// others: it is called again.
    ///
    /// # Errors
    /// When it will not be able again.
    fn recover(&mut self) -> Result<bool, BackendError> {
        Ok(true)
    }

    /// Stores the keys and values of every row, and writes the logits of row
    /// `batch.logit_rows[i]` to `logits[i * vocab..][..vocab]`.
    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError>;

    /// Of every logit row of the last step, the greatest of each block of
    /// [`logits::BLOCK`](shoal_kernels::logits::BLOCK), as [`block_maxima`] gives them. Empty
    /// where the backend does not keep them.
    ///
    /// [`block_maxima`]: shoal_kernels::logits::block_maxima
    fn maxima(&self) -> &[f32] {
        &[]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_come_before_prompts() {
        use Role::{Output, Prompt};
        for (roles, outputs) in [
            (&[][..], Some(0)),
            (&[Prompt, Prompt], Some(0)),
            (&[Output, Output], Some(6)),
            (&[Output, Prompt], Some(3)),
            (&[Prompt, Output], None),
            (&[Output, Prompt, Output], None),
        ] {
            let segments: Vec<Segment> = (0..)
                .zip(roles)
                .map(|(i, &role)| Segment {
                    rows: 3 * i..3 * i + 3,
                    pages: 0..1,
                    role,
                })
                .collect();
            let batch = Batch {
                tokens: &[],
                positions: &[],
                segments: &segments,
                page_table: &[],
                logit_rows: &[],
            };
            assert_eq!(batch.outputs(), outputs, "{roles:?}");
        }
    }
}
