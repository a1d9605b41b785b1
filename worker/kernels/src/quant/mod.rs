//! Activations: quantised to int8 in blocks of 32 or rounded to bf16 for quantised weights, or f32.
//!
//! Of rows for quantised weights, those of prompts may be kept as bf16: that is some 20 times
//! closer to f32, and what matrix units multiply. Which rows are, the caller says.
//!
//! A block with the greatest magnitude `m` has the scale `m / 127` and the values
//! `round(x * (127 / m))`, ties to even, in [-127, 127]. A block below 127 times the least normal
//! f32 is zero, so that no scale is subnormal and no reciprocal overflows; a block with an infinity or a NaN has a NaN scale, so that the fault stays visible in its
//! own row and in no other.

#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::UnsafeCell;

use crate::isa::Isa;
use crate::simd::{LANES, Lanes, dispatch};

/// Values in a block.
pub const BLOCK: usize = 32;

/// Rows that lie interleaved, block by block: a kernel that takes as many reads one stream.
pub(crate) const GROUP: usize = 8;

/// The greatest value of a block.
const MOST: f32 = 127.0;

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

/// What a greatest magnitude, as bits, makes of numbers that become integers of at most `most`:
/// the scale and its reciprocal. A reciprocal of 0 says that the integers are all 0.
#[inline(always)]
pub(crate) fn scales(magnitude: u32, most: f32) -> (f32, f32) {
    let (m, tiny) = (f32::from_bits(magnitude), most * f32::MIN_POSITIVE);
    if (tiny..f32::INFINITY).contains(&m) {
        (m / most, most / m)
    } else if m < tiny {
        (0.0, 0.0)
    } else {
        (f32::NAN, 0.0)
    }
}

/// How activations are kept for a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Quantised to int8 blocks: for quantised weights.
    Int8,
    /// As they are: for weights of floats.
    F32,
}

/// The order in which a product of brain floats sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumOrder {
    /// Pair by pair, as attention does: that of AVX-512 BF16.
    Pairs,
    /// Blocks of 32 columns, of each the even columns and the odd ones: that of AMX.
    Tiles,
}

/// A block of a row as pairs of brain floats: a line of a cache, a row of a matrix unit's tile.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct PairBlock(pub(crate) [u32; BLOCK / 2]);

/// Rows whose blocks of pairs lie together: a tile of a matrix unit.
pub(crate) const PAIR_GROUP: usize = 16;

/// Rows of `k` activations in the forms in which products read them, allocated once and
/// written again in every step.
///
/// Threads may share it: each writes its own rows or columns through
/// [`write_shared`](Self::write_shared).
#[derive(Debug)]
pub struct Activations {
    int8: Option<Box<[UnsafeCell<QuantBlock>]>>,
    f32: Option<Box<[UnsafeCell<f32>]>>,
    pairs: Option<Box<[UnsafeCell<PairBlock>]>>,
    order: SumOrder,
    /// The first row of a prompt.
    prompts: usize,
    rows: usize,
    k: usize,
}

// SAFETY: shared writes go through `write_shared` alone, whose contract excludes races.
unsafe impl Sync for Activations {}

impl Activations {
    /// Room for `rows` rows of `k` values, each row in all of `precisions`: matrices of
    /// floats and quantised ones may then share their inputs.
    ///
    /// # Panics
    /// If one is int8 and `k` no multiple of [`BLOCK`].
    pub fn new(rows: usize, k: usize, precisions: impl IntoIterator<Item = Precision>) -> Self {
        let padded = rows.next_multiple_of(GROUP);
        let mut all = Self {
            int8: None,
            f32: None,
            pairs: None,
            order: SumOrder::Pairs,
            prompts: rows,
            rows,
            k,
        };
        for precision in precisions {
            match precision {
                Precision::Int8 if all.int8.is_none() => {
                    assert!(k.is_multiple_of(BLOCK), "{k} is no multiple of {BLOCK}");
                    all.int8 = Some(zeros(padded * (k / BLOCK)));
                }
                Precision::F32 if all.f32.is_none() => all.f32 = Some(zeros(padded * k)),
                _ => {}
            }
        }
        all
    }

    /// The same, with room for rows of prompts as bf16 if it has room for int8. Their products
    /// sum in `order`.
    pub fn with_prompts(mut self, order: SumOrder) -> Self {
        self.order = order;
        if self.int8.is_some() {
            let groups = self.rows.div_ceil(PAIR_GROUP);
            self.pairs = Some(zeros(groups * PAIR_GROUP * (self.k / BLOCK)));
        }
        self
    }

    /// Says that the rows from `first` on are those of prompts. What rows held is void.
    pub fn set_prompts(&mut self, first: usize) {
        self.prompts = first.min(self.rows);
    }

    /// The first row of a prompt.
    pub fn prompts(&self) -> usize {
        self.prompts
    }

    /// The order in which products of prompts sum.
    pub(crate) fn order(&self) -> SumOrder {
        self.order
    }

    /// The first row that is kept as bf16 in place of int8.
    pub(crate) fn first_pairs(&self) -> usize {
        match self.pairs {
            Some(_) => self.prompts,
            None => self.rows,
        }
    }

    /// The most rows it holds.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Whether they are kept so.
    pub(crate) fn holds(&self, precision: Precision) -> bool {
        match precision {
            Precision::Int8 => self.int8.is_some(),
            Precision::F32 => self.f32.is_some(),
        }
    }

    /// Writes `x` into the columns of `row` from `first` on.
    ///
    /// # Panics
    /// If `x` does not fit, if the machine lacks `isa`, or if they are kept as int8 or bf16 and
    /// `first` or the length of `x` is no multiple of [`BLOCK`].
    pub fn write(&mut self, isa: Isa, row: usize, first: usize, x: &[f32]) {
        // SAFETY: `&mut self` excludes every other thread.
        unsafe { self.write_shared(isa, row, first, x) }
    }

    /// [`write`](Self::write) for threads that share the rows.
    ///
    /// # Safety
    /// No other thread reads or writes the same columns of the same row at the same time.
    ///
    /// # Panics
    /// As `write`.
    pub(crate) unsafe fn write_shared(&self, isa: Isa, row: usize, first: usize, x: &[f32]) {
        assert!(row < self.rows && first <= self.k && x.len() <= self.k - first);
        if let Some(floats) = &self.f32 {
            for (i, &x) in x.iter().enumerate() {
                let at = floats[self.index(row, first + i, self.k)].get();
                // SAFETY: the index is checked; the caller excludes races.
                unsafe { at.write(x) };
            }
        }
        if self.int8.is_none() {
            return;
        }
        let (x, rest) = x.as_chunks::<BLOCK>();
        assert!(
            rest.is_empty() && first.is_multiple_of(BLOCK),
            "no whole blocks"
        );
        if x.is_empty() {
            return;
        }
        if row >= self.first_pairs() {
            let out = self.pairs(row, first / BLOCK);
            // SAFETY: the blocks are of the row, as checked above, and the caller excludes races.
            dispatch!(isa, write_pairs::<_>(x: &[[f32; BLOCK]], out: *mut PairBlock));
            return;
        }
        let out = self.block(row, first / BLOCK);
        match isa.checked() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `checked` found the features, the blocks are of the row, as checked
            // above, and the caller excludes races.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { x86::blocks_avx512(x, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::blocks_avx2(x, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon => unsafe { neon::blocks(x, out) },
            _ => {
                for (i, x) in x.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { out.add(i * GROUP).write(scalar::block(x)) };
                }
            }
        }
    }

    /// The place of a block, from which on its slice may be read or written. The next block of the row is [`GROUP`] further, the same block
    /// of the next row of the group 1 further.
    ///
    /// # Panics
    /// If it is outside, or they are not kept as int8.
    #[inline]
    pub(crate) fn block(&self, row: usize, block: usize) -> *mut QuantBlock {
        match &self.int8 {
            Some(blocks) => {
                let at = self.index(row, block, self.k / BLOCK);
                UnsafeCell::raw_get(blocks[at..].as_ptr())
            }
            None => panic!("the activations are not kept as int8"),
        }
    }

    /// The place of a float, ordered as blocks are.
    ///
    /// # Panics
    /// If it is outside, or they are not kept as f32.
    #[inline]
    pub(crate) fn float(&self, row: usize, column: usize) -> *mut f32 {
        match &self.f32 {
            Some(floats) => UnsafeCell::raw_get(floats[self.index(row, column, self.k)..].as_ptr()),
            None => panic!("the activations are not kept as f32"),
        }
    }

    /// The place of a block of pairs of a prompt's row. The next block of the row is
    /// [`PAIR_GROUP`] further, the same block of the next row of the group 1 further; groups
    /// begin with the first row of a prompt.
    ///
    /// # Panics
    /// If it is outside, or they are not kept as bf16.
    #[inline]
    pub(crate) fn pairs(&self, row: usize, block: usize) -> *mut PairBlock {
        let (row, blocks) = (row - self.prompts, self.k / BLOCK);
        let at = (row / PAIR_GROUP * blocks + block) * PAIR_GROUP + row % PAIR_GROUP;
        match &self.pairs {
            Some(pairs) => UnsafeCell::raw_get(pairs[at..].as_ptr()),
            None => panic!("the activations are not kept as bf16"),
        }
    }

    #[inline]
    fn index(&self, row: usize, column: usize, columns: usize) -> usize {
        (row / GROUP * columns + column) * GROUP + row % GROUP
    }
}

fn zeros<T: Default>(len: usize) -> Box<[UnsafeCell<T>]> {
    (0..len).map(|_| UnsafeCell::default()).collect()
}

/// Writes the blocks of a row, `PAIR_GROUP` apart.
///
/// # Safety
/// See [`Lanes`]; the blocks are the caller's own.
#[inline(always)]
unsafe fn write_pairs<L: Lanes>(x: &[[f32; BLOCK]], out: *mut PairBlock) {
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the contract of this function.
        unsafe {
            let out = out.add(i * PAIR_GROUP).cast::<u16>();
            L::load(x.as_ptr()).to_bf16().store_high(out);
            L::load(x.as_ptr().add(LANES))
                .to_bf16()
                .store_high(out.add(LANES));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Blocks below are zero.
    const TINY: f32 = MOST * f32::MIN_POSITIVE;

    fn all(x: &[f32; BLOCK]) -> QuantBlock {
        let blocks: Vec<QuantBlock> = Isa::available()
            .map(|isa| {
                let mut rows = Activations::new(1, BLOCK, [Precision::Int8]);
                rows.write(isa, 0, 0, x);
                // SAFETY: in bounds, and nothing writes.
                unsafe { *rows.block(0, 0) }
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
        let mut rows = Activations::new(19, 96, [Precision::Int8]);
        for row in 0..19 {
            for block in 0..3 {
                let x = [(row * 3 + block + 1) as f32; BLOCK];
                rows.write(Isa::Scalar, row, block * BLOCK, &x);
            }
        }
        for row in 0..19 {
            for block in 0..3 {
                // SAFETY: in bounds, and nothing writes.
                let scale = unsafe { (*rows.block(row, block)).scale };
                assert_eq!(scale, (row * 3 + block + 1) as f32 / 127.0);
            }
        }
    }

    #[test]
    #[should_panic]
    fn a_row_too_long_is_refused() {
        Activations::new(1, 64, [Precision::Int8]).write(Isa::Scalar, 0, 32, &[0.0; 64]);
    }
}
