//! How a page keeps its numbers: what the append writes and attention reads.
//!
//! A page holds [`PAGE`] tokens of one key–value head in the order that attention reads it,
//! keys in its first half, values in its second. The numbers go by pairs, sixteen pairs beside
//! each other: keys as `[half of 16 tokens][pair of dims][token]`, so that lanes are tokens,
//! values as `[pair of tokens][dim]`, so that lanes are dimensions. Nothing is re-packed after
//! the append.
//!
//! A pair of brain floats or of int16 is one word, a pair of int8 half of one. Each half of integers
//! ends with a scale for every token, by which scores and weights are multiplied in place of the
//! numbers.

use super::PAGE;
use crate::Isa;
use crate::bf16::{bf16, pairs};
use crate::int16::Int16;
use crate::quant::scales;
use crate::simd::{LANES, Lanes, dispatch};

/// Greatest int16 of a key or a value: products of a whole head, or of the weights of a span, sum
/// to less than 2³¹.
pub(super) const MOST_INT16: f32 = 4095.0;

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Brain floats.
    Bf16,
    /// Integers of 13 bits with an f32 scale for every token of a head: closer than brain floats,
    /// and quicker to multiply.
    #[default]
    Int16,
    /// int8 with an f32 scale for every token of a head: about half the bytes.
    Int8,
}

impl KvType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::Int16, Self::Int8];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
        }
    }

    /// u32 words of the keys, or of the values, of a page of one head.
    pub(crate) const fn half_words(self, head_dim: usize) -> usize {
        self.scales_at(head_dim) + self.scales()
    }

    /// u32 words of the numbers of a half: where its scales begin.
    pub(super) const fn scales_at(self, head_dim: usize) -> usize {
        match self {
            Self::Bf16 | Self::Int16 => PAGE * head_dim / 2,
            Self::Int8 => PAGE * head_dim / 4,
        }
    }

    /// Scales of a half, a word each.
    const fn scales(self) -> usize {
        match self {
            Self::Bf16 => 0,
            Self::Int16 | Self::Int8 => PAGE,
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
            KvType::Int16 | KvType::Int8 => {
                let (first, strides) = (2 * (half + offset % LANES), [LANES * LANES, 2 * LANES, 1]);
                let scale = keys.add(kv.scales_at(key.len()) + offset);
                put(isa, kv, (keys, first), strides, scale, key);
            }
        }
    }
}

/// Asks for the lines that [`append_key`] writes: one for each pair of the key, or for two of int8.
pub(crate) fn expect_key(isa: Isa, kv: KvType, keys: *const u32, offset: usize, hd: usize) {
    let tokens = kv.scales_at(hd) * LANES / PAGE;
    let first = keys.wrapping_add(offset / LANES * tokens);
    // SAFETY: the kernel needs the features alone.
    dispatch!(isa, ask::<_>(first: *const u32, tokens: usize));
}

/// Asks for the lines of so many words.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
unsafe fn ask<L: Lanes>(first: *const u32, words: usize) {
    for line in (0..words).step_by(LANES) {
        L::prefetch(first.wrapping_add(line).cast());
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
        KvType::Int16 | KvType::Int8 => {
            let values = values.as_mut_ptr();
            let first = offset / 2 * 2 * hd + usize::from(second);
            let strides = [2 * LANES, 4, 2];
            // SAFETY: the numbers and the scale of a token of the page, as checked.
            unsafe {
                let scale = values.add(kv.scales_at(hd) + offset);
                put(isa, kv, (values, first), strides, scale, value);
            }
        }
    }
}

/// Quantises keys or values to integers of a half, from number `first` on.
///
/// # Safety
/// As [`put_int16`]; the half is of `kv`, integers.
unsafe fn put(
    isa: Isa,
    kv: KvType,
    (half, first): (*mut u32, usize),
    strides: [usize; 3],
    scale: *mut u32,
    x: &[f32],
) {
    // SAFETY: the contract of this function.
    unsafe {
        if kv == KvType::Int8 {
            put_int8(isa, half.cast::<i8>().add(first), strides, scale, x);
        } else {
            let first = half.cast::<i16>().add(first);
            put_int16(isa, first, strides, scale, x, MOST_INT16);
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

/// Quantises a query into pairs; gives what they were divided by.
pub(super) fn quantise_query(isa: Isa, query: &[f32], words: &mut [u32]) -> f32 {
    assert_eq!(query.len(), 2 * words.len());
    let most = most_of_query(query.len());
    let (first, mut scale) = (words.as_mut_ptr().cast::<i16>(), 0);
    // SAFETY: there is a word for every pair.
    unsafe { put_int16(isa, first, [LANES, 2, 1], &raw mut scale, query, most) };
    f32::from_bits(scale)
}

/// Greatest number of a query: products with a key sum to less than 2³¹.
fn most_of_query(head_dim: usize) -> f32 {
    let fits = i32::MAX as usize / MOST_INT16 as usize / head_dim;
    fits.min(i16::MAX as usize) as f32
}

/// Quantises `x` in one block, as activations are, to integers of at most `most`. Number
/// `16 i + 2 j + k` goes to `first + i * strides[0] + j * strides[1] + k * strides[2]`.
///
/// # Safety
/// These places and that of the scale are valid, and no one else's.
unsafe fn put_int16(
    isa: Isa,
    first: *mut i16,
    strides: [usize; 3],
    scale: *mut u32,
    x: &[f32],
    most: f32,
) {
    // SAFETY: the contract of this function.
    dispatch!(isa, put_block::<_, i16>(
        first: *mut i16, strides: [usize; 3], scale: *mut u32, x: &[f32], most: f32,
    ));
}

/// [`put_int16`] with half the bits.
///
/// # Safety
/// The same.
unsafe fn put_int8(isa: Isa, first: *mut i8, strides: [usize; 3], scale: *mut u32, x: &[f32]) {
    let most = f32::from(i8::MAX);
    // SAFETY: the contract of this function.
    dispatch!(isa, put_block::<_, i8>(
        first: *mut i8, strides: [usize; 3], scale: *mut u32, x: &[f32], most: f32,
    ));
}

/// An integer of few bits.
trait Number: Copy {
    /// A number that has as few.
    fn of(value: i16) -> Self;
}

impl Number for i8 {
    fn of(value: i16) -> Self {
        value as Self
    }
}

impl Number for i16 {
    fn of(value: i16) -> Self {
        value
    }
}

/// # Safety
/// See [`Lanes`] and [`put_int16`].
#[inline(always)]
unsafe fn put_block<L: Int16, T: Number>(
    first: *mut T,
    strides: [usize; 3],
    scale: *mut u32,
    x: &[f32],
    most: f32,
) {
    let mut magnitude = 0;
    for x in x {
        magnitude = magnitude.max(x.to_bits() & 0x7fff_ffff);
    }
    let (by, inverse) = scales(magnitude, most);
    // SAFETY: the contract of this function.
    unsafe {
        scale.write(by.to_bits());
        for (i, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
            let mut values = [0; LANES];
            let lanes = L::load(x.as_ptr()).mul(L::splat(inverse));
            lanes.put(values.as_mut_ptr());
            let first = first.add(i * strides[0]);
            for (j, pair) in values.as_chunks::<2>().0.iter().enumerate() {
                let first = first.add(j * strides[1]);
                if strides[2] == 1 {
                    first.cast::<[T; 2]>().write_unaligned(pair.map(T::of));
                } else {
                    first.write(T::of(pair[0]));
                    first.add(strides[2]).write(T::of(pair[1]));
                }
            }
        }
    }
}
