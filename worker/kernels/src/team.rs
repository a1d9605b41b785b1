//! The threads that compute, with what each needs beside its items.

use crate::Isa;
use crate::attention;
use crate::gemm::{Panel, ROW_BLOCK};
use crate::lines::Lines;
use crate::pool::Pool;

/// Columns of a gate and an up projection whose products are one block of activations.
pub(crate) const GATED: usize = 64;

/// A pool, the instruction set that it computes with, and scratch memory for every thread, so
/// that no phase allocates.
pub struct Team {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    pub(crate) scratch: Vec<Scratch>,
}

/// What one thread writes and reads within an item.
pub(crate) struct Scratch {
    /// A row of a model, or some columns of a block of rows, or the results of queries.
    pub(crate) tile: Lines,
    /// Weights of a few strips, widened.
    pub(crate) panel: Panel,
    pub(crate) attention: attention::Scratch,
}

impl Team {
    /// `threads` threads for rows of up to `width` numbers and heads of `head_dim`.
    ///
    /// # Errors
    /// When the system refuses a thread.
    ///
    /// # Panics
    /// When the machine lacks `isa`.
    pub fn new(threads: usize, isa: Isa, width: usize, head_dim: usize) -> std::io::Result<Self> {
        let pool = Pool::new(threads)?;
        let tile = width.max(ROW_BLOCK * head_dim.max(GATED));
        let scratch = (0..pool.threads()).map(|_| Scratch {
            tile: Lines::new(tile),
            panel: Panel::default(),
            attention: attention::Scratch::new(head_dim),
        });
        Ok(Self {
            scratch: scratch.collect(),
            isa: isa.checked(),
            pool,
        })
    }

    /// Threads, the driver's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}
