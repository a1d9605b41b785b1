//! Activations quantised to int8 in blocks of 32.
//!
//! A block with the greatest magnitude `m` has the scale `m / 127` and the values
//! `round(x * (127 / m))`, ties to even, in [-127, 127]. A block below [`TINY`] is zero; a
//! block with an infinity or a NaN has a NaN scale, so that the fault stays visible in its
//! own row and in no other.

mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::UnsafeCell;

use crate::isa::Isa;

/// Values in a block.
pub const BLOCK: usize = 32;

/// Rows that lie interleaved, block by block: a kernel that takes as many reads one stream.
pub(crate) const GROUP: usize = 8;

/// Blocks whose greatest magnitude is less are zero: 127 times the least normal f32, so that
/// no scale is subnormal and no reciprocal overflows.
pub const TINY: f32 = 127.0 * f32::MIN_POSITIVE;

/// A block of 32 quantised activations, with the sums that the weights' zeros and minima need.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub(crate) struct QuantBlock {
    /// The values, in [-127, 127].
    pub(crate) values: [i8; BLOCK],
    /// An activation is `scale * value`.
    pub(crate) scale: f32,
    /// `scale * sum(values)`.
    pub(crate) scaled_sum: f32,
    /// `-sum(values)`.
    pub(crate) neg_sum: i32,
    /// `-sum(values[..16])`.
    pub(crate) neg_low: i32,
}

impl QuantBlock {
    /// What a greatest magnitude, as bits, makes of a block: its scale and its reciprocal.
    /// A reciprocal of 0 says that the values are all 0.
    #[inline(always)]
    fn scales(magnitude: u32) -> (f32, f32) {
        let m = f32::from_bits(magnitude);
        if (TINY..f32::INFINITY).contains(&m) {
            (m / 127.0, 127.0 / m)
        } else if m < TINY {
            (0.0, 0.0)
        } else {
            (f32::NAN, 0.0)
        }
    }
}

/// Rows of `k` quantised activations, allocated once and written again in every step.
///
/// Threads may share it: each writes its own rows or blocks through
/// [`quantize_shared`](Self::quantize_shared).
#[derive(Debug)]
pub struct QuantRows {
    blocks: Box<[UnsafeCell<QuantBlock>]>,
    rows: usize,
    row_blocks: usize,
}

// SAFETY: shared writes go through `quantize_shared` alone, whose contract excludes races.
unsafe impl Sync for QuantRows {}

impl QuantRows {
    /// Room for `rows` rows of `k` values.
    ///
    /// # Panics
    /// If `k` is no multiple of [`BLOCK`].
    pub fn new(rows: usize, k: usize) -> Self {
        assert!(k.is_multiple_of(BLOCK), "{k} is no multiple of {BLOCK}");
        let row_blocks = k / BLOCK;
        let len = rows.next_multiple_of(GROUP) * row_blocks;
        let blocks = (0..len).map(|_| UnsafeCell::default()).collect();
        Self {
            blocks,
            rows,
            row_blocks,
        }
    }

    /// The most rows it holds.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn k(&self) -> usize {
        self.row_blocks * BLOCK
    }

    /// Quantises `x` into the blocks of `row` from `first` on.
    ///
    /// # Panics
    /// If `x` is no multiple of [`BLOCK`] or does not fit, or if the machine lacks `isa`.
    pub fn quantize(&mut self, isa: Isa, row: usize, first: usize, x: &[f32]) {
        // SAFETY: `&mut self` excludes every other thread.
        unsafe { self.quantize_shared(isa, row, first, x) }
    }

    /// [`quantize`](Self::quantize) for threads that share the rows.
    ///
    /// # Safety
    /// No other thread reads or writes the same blocks of the same row at the same time.
    ///
    /// # Panics
    /// As `quantize`.
    pub unsafe fn quantize_shared(&self, isa: Isa, row: usize, first: usize, x: &[f32]) {
        let (x, rest) = x.as_chunks::<BLOCK>();
        assert!(rest.is_empty(), "no whole number of blocks");
        assert!(row < self.rows && first + x.len() <= self.row_blocks);
        let mut out = self.at(row, first);
        let isa = isa.checked();
        for x in x {
            let block = match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `checked` found the features.
                Isa::Avx512 => unsafe { x86::block_avx512(x) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { x86::block_avx2(x) },
                _ => scalar::block(x),
            };
            // SAFETY: the asserted bounds keep `out` inside; the caller excludes races.
            unsafe { out.write(block) };
            out = out.wrapping_add(GROUP);
        }
    }

    /// The place of a block. The next block of the row is [`GROUP`] further, the same block
    /// of the next row of the group 1 further.
    #[inline]
    pub(crate) fn at(&self, row: usize, block: usize) -> *mut QuantBlock {
        let index = (row / GROUP * self.row_blocks + block) * GROUP + row % GROUP;
        debug_assert!(index < self.blocks.len() || block == self.row_blocks);
        UnsafeCell::raw_get(self.blocks.as_ptr().wrapping_add(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(x: &[f32; BLOCK]) -> QuantBlock {
        let blocks: Vec<QuantBlock> = Isa::available()
            .map(|isa| {
                let mut rows = QuantRows::new(1, BLOCK);
                rows.quantize(isa, 0, 0, x);
                // SAFETY: in bounds, and nothing writes.
                unsafe { *rows.at(0, 0) }
            })
            .collect();
        for b in &blocks {
            assert_eq!(b.values, blocks[0].values);
            assert_eq!(b.scale.to_bits(), blocks[0].scale.to_bits());
            assert_eq!(b.scaled_sum.to_bits(), blocks[0].scaled_sum.to_bits());
            assert_eq!(
                (b.neg_sum, b.neg_low),
                (blocks[0].neg_sum, blocks[0].neg_low)
            );
        }
        blocks[0]
    }

    proptest! {
        #[test]
        fn is_exact_on_every_isa(x in prop::array::uniform32(-1e3f32..1e3), power in -140i32..118) {
            let x = x.map(|v| v * 2f32.powi(power));
            let b = all(&x);
            let sum: i32 = b.values.iter().map(|&v| i32::from(v)).sum();
            let low: i32 = b.values[..16].iter().map(|&v| i32::from(v)).sum();
            prop_assert_eq!(b.neg_sum, -sum);
            prop_assert_eq!(b.neg_low, -low);
            prop_assert_eq!(b.scaled_sum, b.scale * sum as f32);
            prop_assert!(b.values.iter().all(|&v| v >= -127));
            let m = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            if m < TINY {
                prop_assert_eq!(b.scale, 0.0);
                prop_assert_eq!(b.values, [0; BLOCK]);
            } else {
                for (&v, &x) in b.values.iter().zip(&x) {
                    let error = f64::from(b.scale) * f64::from(v) - f64::from(x);
                    prop_assert!(error.abs() <= f64::from(b.scale) * 0.5001);
                }
            }
        }
    }

    #[test]
    fn ties_go_to_even() {
        let mut x = [0f32; BLOCK];
        x[..6].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]);
        assert_eq!(all(&x).values[..6], [127, 0, 2, 2, 0, -2]);
    }

    #[test]
    fn what_is_not_finite_shows_in_the_scale_alone() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1f32; BLOCK];
            x[17] = bad;
            let b = all(&x);
            assert!(b.scale.is_nan() && b.scaled_sum.is_nan());
            assert_eq!((b.values, b.neg_sum, b.neg_low), ([0; BLOCK], 0, 0));
        }
    }

    #[test]
    fn the_greatest_magnitudes_stay_finite() {
        for m in [f32::MAX / 64.0, TINY, f32::MIN_POSITIVE, 1e-45, 0.0] {
            let b = all(&[m; BLOCK]);
            assert!(b.scale.is_finite() && b.scaled_sum.is_finite());
            assert!(b.values == [127; BLOCK] || b.values == [0; BLOCK]);
        }
    }

    #[test]
    fn rows_and_blocks_have_their_own_places() {
        let mut rows = QuantRows::new(19, 96);
        for row in 0..19 {
            for block in 0..3 {
                let x = [(row * 3 + block + 1) as f32; BLOCK];
                rows.quantize(Isa::Scalar, row, block, &x);
            }
        }
        for row in 0..19 {
            for block in 0..3 {
                // SAFETY: in bounds, and nothing writes.
                let scale = unsafe { (*rows.at(row, block)).scale };
                assert_eq!(scale, (row * 3 + block + 1) as f32 / 127.0);
            }
        }
    }

    #[test]
    #[should_panic]
    fn a_row_too_long_is_refused() {
        QuantRows::new(1, 64).quantize(Isa::Scalar, 0, 1, &[0.0; 64]);
    }
}
