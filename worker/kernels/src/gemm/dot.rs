//! What the kernel needs of an instruction set beside [`Lanes`]: weights to lanes, and the
//! exact integer dot of sixteen rows with a block of activations.

use half::{bf16, f16};

use crate::pack::{STRIP, TILE};
use crate::quant::QuantBlock;
use crate::simd::{Lanes, Scalar};

/// The columns of a dot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    All,
    Low,
    High,
}

/// Weights as lanes: lane r is row r of a strip.
///
/// # Safety
/// As [`Lanes`]; `V` is the number of 64-byte vectors of a tile, 4 or 8, and pointers are
/// valid for what they stand for.
pub(super) trait Dot: Lanes {
    /// Rows of activations whose sums fit in the registers; at most [`GROUP`](crate::quant::GROUP).
    const ROWS: usize;
    /// Rows from which on it pays to widen quants of four bits to eight before the dots, if it does.
    const MANY: Option<usize> = None;

    /// Sixteen f16.
    unsafe fn f16(p: *const u8) -> Self;
    /// Sixteen bf16.
    unsafe fn bf16(p: *const u8) -> Self;
    /// The sums over the columns of `part` of `(q - zero) * activation`, exact, for the quants of a
    /// tile and `M` rows of activations. `NARROW` quants are less than 16, whatever `V`.
    unsafe fn dots<const V: usize, const NARROW: bool, const M: usize>(
        tile: *const u8,
        acts: *const QuantBlock,
        part: Part,
        zero: i32,
    ) -> [Self; M];
    /// `1 + q / 2^BITS` for the quant at bit `at` of each of sixteen words.
    #[inline(always)]
    unsafe fn one_and<const BITS: u32>(p: *const u8, at: u32) -> Self {
        // SAFETY: the caller vouches for sixteen words.
        let words = unsafe { p.cast::<[u32; STRIP]>().read_unaligned() };
        let one_and = words.map(|word| {
            let quant = word >> at & ((1 << BITS) - 1);
            f32::from_bits(1f32.to_bits() | quant << (23 - BITS))
        });
        // SAFETY: sixteen numbers.
        unsafe { Self::load(one_and.as_ptr()) }
    }
}

impl Part {
    /// The groups of four columns.
    #[inline(always)]
    pub(super) const fn groups(self) -> (usize, usize) {
        match self {
            Self::All => (0, 8),
            Self::Low => (0, 4),
            Self::High => (4, 8),
        }
    }

    /// `-sum` of the activations.
    #[inline(always)]
    pub(super) fn neg_sum(self, act: &QuantBlock) -> i32 {
        match self {
            Self::All => act.neg_sum,
            Self::Low => act.neg_low,
            Self::High => act.neg_sum - act.neg_low,
        }
    }
}

impl Dot for Scalar {
    /// More would be code that is compiled for long and run by tests.
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> Self {
        // SAFETY: the caller vouches for sixteen numbers.
        let bits = unsafe { p.cast::<[u16; STRIP]>().read_unaligned() };
        Self(bits.map(|bits| f16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self {
        // SAFETY: the caller vouches for sixteen numbers.
        let bits = unsafe { p.cast::<[u16; STRIP]>().read_unaligned() };
        Self(bits.map(|bits| bf16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn dots<const V: usize, const NARROW: bool, const M: usize>(
        tile: *const u8,
        acts: *const QuantBlock,
        part: Part,
        zero: i32,
    ) -> [Self; M] {
        // SAFETY: the caller vouches for the tile.
        let quants = unsafe { bytes::<V>(tile) };
        let (from, to) = part.groups();
        let mut dots = [Self([0.0; STRIP]); M];
        for (i, dot) in dots.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the blocks of `M` rows.
            let act = unsafe { &*acts.add(i) };
            let start = zero * part.neg_sum(act);
            for (dot, row) in dot.0.iter_mut().zip(&quants) {
                let pairs = row[4 * from..4 * to]
                    .iter()
                    .zip(&act.values[4 * from..4 * to]);
                let products = pairs.map(|(&q, &a)| i32::from(q) * i32::from(a));
                *dot = (start + products.sum::<i32>()) as f32;
            }
        }
        dots
    }
}

/// The quants of a tile, row by row.
///
/// # Safety
/// `tile` has `V` vectors.
unsafe fn bytes<const V: usize>(tile: *const u8) -> [[u8; TILE]; STRIP] {
    let mut quants = [[0; TILE]; STRIP];
    for v in 0..V {
        // SAFETY: the contract of this function.
        let vector = unsafe { tile.cast::<[[u8; 4]; STRIP]>().add(v).read() };
        for (row, bytes) in quants.iter_mut().zip(vector) {
            if V == 8 {
                row[4 * v..4 * v + 4].copy_from_slice(&bytes);
            } else {
                row[8 * v..8 * v + 4].copy_from_slice(&bytes.map(|b| b & 0xf));
                row[8 * v + 4..8 * v + 8].copy_from_slice(&bytes.map(|b| b >> 4));
            }
        }
    }
    quants
}
