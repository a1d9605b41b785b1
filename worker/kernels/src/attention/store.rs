//! How a page keeps its numbers: what the append writes and attention reads.
//!
//! A page holds [`PAGE`] tokens of one key–value head in the order that attention reads it,
//! keys in its first half, values in its second. The numbers go by pairs, sixteen pairs beside
//! each other: keys as `[half of 16 tokens][pair of dims][token]`, so that lanes are tokens,
//! values as `[pair of tokens][dim]`, so that lanes are dimensions. Nothing is re-packed after
//! the append.
//!
//! A pair of brain floats is one word. Of sixteen pairs of int8 the first numbers come first,
//! then the second ones: they are widened to the same pairs, exactly. Each half ends with a
//! scale for every token, by which scores and weights are multiplied in place of the numbers.

use super::PAGE;
use crate::Isa;
use crate::bf16::{Pairs, bf16, pairs};
use crate::quant::QuantBlock;
use crate::simd::{LANES, Lanes, dispatch};

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Brain floats.
    #[default]
    Bf16,
    /// int8 with an f32 scale for every token of a head: about half the bytes.
    Int8,
}

impl KvType {
    /// Every type.
    pub const ALL: [Self; 2] = [Self::Bf16, Self::Int8];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// u32 words of the keys, or of the values, of a page of one head.
    pub(crate) const fn half_words(self, head_dim: usize) -> usize {
        match self {
            Self::Bf16 => PAGE * head_dim / 2,
            Self::Int8 => PAGE * head_dim / 4 + PAGE,
        }
    }

    /// u32 words of a page of one head.
    pub(crate) const fn page_words(self, head_dim: usize) -> usize {
        2 * self.half_words(head_dim)
    }
}

/// Stores the key of one token at `offset` of a page, and touches nothing of another token.
///
/// # Safety
/// `keys` is where the keys of a page begin, one of this type and of heads as wide as `key`;
/// `offset` is in the page.
pub(crate) unsafe fn append_key(isa: Isa, kv: KvType, keys: *mut u32, offset: usize, key: &[f32]) {
    let half = offset / LANES * (key.len() / 2 * LANES);
    // SAFETY: the numbers and the scale of a token of the page.
    unsafe {
        match kv {
            KvType::Bf16 => {
                let mut words = [0; LANES];
                for (i, key) in key.chunks(2 * LANES).enumerate() {
                    let words = &mut words[..key.len() / 2];
                    pairs(isa, key, words);
                    for (j, &word) in words.iter().enumerate() {
                        let pair = half + (i * LANES + j) * LANES;
                        keys.add(pair + offset % LANES).write(word);
                    }
                }
            }
            KvType::Int8 => {
                let first = keys.cast::<i8>().add(2 * half + offset % LANES);
                let scale = keys.add(scales_at(key.len()) + offset);
                put_int8(isa, first, [LANES * LANES, LANES], scale, key);
            }
        }
    }
}

/// Stores the value of one token at `offset` of the values of a page. Of brain floats, the
/// first token of a pair clears its partner's place, so no value of the page's previous owner
/// is ever read.
///
/// # Panics
/// When the slices are not of the page's shape.
pub(crate) fn append_value(isa: Isa, kv: KvType, values: &mut [u32], offset: usize, value: &[f32]) {
    let hd = value.len();
    assert!(values.len() == kv.half_words(hd) && offset < PAGE && hd.is_multiple_of(LANES));
    let second = !offset.is_multiple_of(2);
    match kv {
        KvType::Bf16 => {
            let words = &mut values[offset / 2 * hd..][..hd];
            // SAFETY: the kernel needs the features alone.
            dispatch!(isa, put_bf16::<_>(words: &mut [u32], value: &[f32], second: bool));
        }
        KvType::Int8 => {
            let values = values.as_mut_ptr();
            // SAFETY: the numbers and the scale of a token of the page, as checked.
            unsafe {
                let pair = values.cast::<i8>().add(offset / 2 * 2 * hd);
                let first = pair.add(if second { LANES } else { 0 });
                let scale = values.add(scales_at(hd) + offset);
                put_int8(isa, first, [2 * LANES, 1], scale, value);
            }
        }
    }
}

/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn put_bf16<L: Lanes>(words: &mut [u32], value: &[f32], second: bool) {
    if second {
        for (word, &v) in words.iter_mut().zip(value) {
            *word = (*word & 0xffff) | bf16(v) << 16;
        }
    } else {
        for (word, &v) in words.iter_mut().zip(value) {
            *word = bf16(v);
        }
    }
}

/// Words of a half of int8 before its scales.
const fn scales_at(head_dim: usize) -> usize {
    PAGE * head_dim / 4
}

/// Quantises `x` as activations are, in one block. Number `16 i + j` goes to
/// `first + i * strides[0] + j * strides[1]`.
///
/// # Safety
/// These places and that of the scale are valid, and no one else's.
unsafe fn put_int8(isa: Isa, first: *mut i8, strides: [usize; 2], scale: *mut u32, x: &[f32]) {
    // SAFETY: the contract of this function.
    dispatch!(isa, put_block::<_>(
        first: *mut i8, strides: [usize; 2], scale: *mut u32, x: &[f32],
    ));
}

/// # Safety
/// See [`Lanes`] and [`put_int8`].
#[inline(always)]
unsafe fn put_block<L: Lanes>(first: *mut i8, strides: [usize; 2], scale: *mut u32, x: &[f32]) {
    /// What added to a small number leaves its nearest integer in the low bits, ties to even.
    const ROUND: f32 = (3 << 22) as f32;
    let mut magnitude = 0;
    for x in x {
        magnitude = magnitude.max(x.to_bits() & 0x7fff_ffff);
    }
    let (by, inverse) = QuantBlock::scales(magnitude);
    // SAFETY: the contract of this function.
    unsafe {
        scale.write(by.to_bits());
        for (i, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
            let mut values = [0; LANES];
            for (value, x) in values.iter_mut().zip(x) {
                *value = (x * inverse + ROUND).to_bits() as i8;
            }
            for (j, value) in values.into_iter().enumerate() {
                first.add(i * strides[0] + j * strides[1]).write(value);
            }
        }
    }
}

/// How attention reads what is kept so.
///
/// # Safety
/// As [`Lanes`]. A half is where the keys or the values of a page of the type begin, and what is
/// read is of that page.
pub(super) trait Stored {
    /// The type.
    const TYPE: KvType;
    /// Pairs in a word.
    const PAIRS: usize;
    /// Sixteen pairs.
    unsafe fn load<L: Lanes, P: Pairs<L>>(line: *const u32) -> P::Words;
    /// What the numbers of sixteen tokens were divided by, from `token` on; 0 beyond the first
    /// `n` of them, whatever the page had there. `None` if they were not.
    unsafe fn scales<L: Lanes>(half: *const u32, hd: usize, token: usize, n: usize) -> Option<L>;

    /// Where sixteen pairs lie, from the pair `at` on.
    #[inline(always)]
    fn line(half: *const u32, at: usize) -> *const u32 {
        half.wrapping_add(at / Self::PAIRS)
    }
}

/// See [`KvType::Bf16`].
pub(super) struct Bf16;

impl Stored for Bf16 {
    const TYPE: KvType = KvType::Bf16;
    const PAIRS: usize = 1;
    #[inline(always)]
    unsafe fn load<L: Lanes, P: Pairs<L>>(line: *const u32) -> P::Words {
        // SAFETY: the caller's contract.
        unsafe { P::load(line) }
    }
    #[inline(always)]
    unsafe fn scales<L: Lanes>(_: *const u32, _: usize, _: usize, _: usize) -> Option<L> {
        None
    }
}

/// See [`KvType::Int8`].
pub(super) struct Int8;

impl Stored for Int8 {
    const TYPE: KvType = KvType::Int8;
    const PAIRS: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes, P: Pairs<L>>(line: *const u32) -> P::Words {
        // SAFETY: the caller's contract.
        unsafe { P::widen(line.cast()) }
    }
    #[inline(always)]
    unsafe fn scales<L: Lanes>(half: *const u32, hd: usize, token: usize, n: usize) -> Option<L> {
        // SAFETY: the caller's contract.
        unsafe {
            let scales = L::load(half.add(scales_at(hd) + token).cast());
            // `max` returns its second operand on NaN: a fault survives.
            Some(L::splat(0.0).max(scales.first(n)))
        }
    }
}
