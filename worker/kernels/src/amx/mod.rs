//! Products of brain floats by the tile unit of x86-64 (AMX), and the order in which it sums.
//!
//! # Tile order
//!
//! The columns of a row are summed in blocks of 32, ascending. Of a block
//!
//! `even = Σ a[2i] * b[2i]` and `odd = Σ a[2i + 1] * b[2i + 1]`, i from 0 to 15,
//!
//! each a chain of fused multiply-adds from zero; then `acc = acc + (even + odd)`. All round to
//! nearest even. That is the operation of TDPBF16PS as the Intel SDM (volume 2) writes it; the
//! Intrinsics Guide writes another, one chain through the accumulator. We follow the SDM, and
//! [`state`] tries the machine before it is believed.
//!
//! The unit takes subnormals for zeros. Numbers are those that `bf16` rounds to, so that no
//! sum is subnormal, and the same order in software gives the same bits.
//!
//! # Layout
//!
//! Numbers lie in pairs, the even column in the low half of a word. Activations are groups of 16
//! rows, and of a group blocks of 32 columns, `[16 rows][16 pairs]`. A panel is the weights of a
//! strip of 16 outputs, in blocks `[16 pairs][16 outputs]`. Each block is one tile of 1 KiB.

mod order;
mod state;
#[cfg(test)]
mod tests;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit;

pub(crate) use order::multiply as in_software;
pub use state::{Lack, available, state};

use crate::Isa;
use crate::gemm::Outputs;

/// Rows in a group, pairs in a block and outputs in a panel: the side of a tile in words.
const SIDE: usize = 16;

/// Words in a tile.
const TILE: usize = SIDE * SIDE;

/// Some rows times one or two panels.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// Of each strip its `blocks` tiles.
    pub(crate) panels: &'a [*const u32],
    /// Outputs: those of all panels, or less by what the last is padded with.
    pub(crate) n: usize,
    /// Blocks of 32 columns.
    pub(crate) blocks: usize,
    /// The first word of the first group.
    pub(crate) acts: *const u32,
    pub(crate) rows: usize,
    /// The sum over all columns is complete before it is added to what is there.
    pub(crate) out: Outputs,
}

impl Product<'_> {
    /// The outputs of a panel.
    #[inline(always)]
    fn width(&self, panel: usize) -> usize {
        self.n.saturating_sub(panel * SIDE).min(SIDE)
    }

    fn is_sound(&self) -> bool {
        (1..=2).contains(&self.panels.len())
            && self.n.div_ceil(SIDE) == self.panels.len()
            && self.blocks > 0
            && self.rows > 0
    }
}

/// A product in tile order: by the unit where `isa` is the best of a machine that has it, else
/// in software.
///
/// # Safety
/// The pointers are valid for what [`Product`] says of them, and no other thread writes what is
/// read or touches what is written.
///
/// # Panics
/// When the machine lacks `isa`.
pub(crate) unsafe fn multiply(isa: Isa, product: &Product<'_>) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if isa == Isa::detect() && available() {
        // SAFETY: the contract of this function.
        return unsafe { unit::multiply(product) };
    }
    // SAFETY: as above.
    unsafe { order::multiply(isa, product) }
}
