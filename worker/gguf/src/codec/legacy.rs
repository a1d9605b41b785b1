//! The formats with one scale, and perhaps one minimum, per block of 32 weights.
//!
//! A block is `d: f16`, then `m: f16` in the `_1` types, then 4 bytes of fifth bits in the
//! 5-bit types, then the nibbles: byte j holds weight j low and weight j + 16 high.

#![allow(non_camel_case_types)] // Named as the types are.

use super::block::{largest, quant, range, read_f16, write_f16};
use super::{Format, GROUP, Group};

pub(super) type Q4_0 = Nibbles<4, false>;
pub(super) type Q4_1 = Nibbles<4, true>;
pub(super) type Q5_0 = Nibbles<5, false>;
pub(super) type Q5_1 = Nibbles<5, true>;
pub(super) struct Q8_0;

/// The types of `BITS` bits, 4 or 5, with a zero point or with a minimum.
pub(super) struct Nibbles<const BITS: u32, const MIN: bool>;

impl<const BITS: u32, const MIN: bool> Nibbles<BITS, MIN> {
    /// The largest quant.
    const MOST: f32 = ((1 << BITS) - 1) as f32;
    /// Where the fifth bits are, if any.
    const HIGH: usize = if MIN { 4 } else { 2 };
    /// Where the nibbles are.
    const LOW: usize = if BITS == 5 { Self::HIGH + 4 } else { Self::HIGH };
}

impl<const BITS: u32, const MIN: bool, const N: usize> Format<N> for Nibbles<BITS, MIN> {
    const LEN: usize = GROUP;
    const ZERO: u8 = if MIN { 0 } else { 1 << (BITS - 1) };

    #[inline]
    fn unpack(block: &[u8; N], mut each: impl FnMut(&Group)) {
        let mut quants = nibbles(&block[Self::LOW..]);
        if BITS == 5 {
            add_fifth_bits(&mut quants, &block[Self::HIGH..]);
        }
        each(&Group {
            quants,
            scales: [read_f16(block, 0); 2],
            min: if MIN { read_f16(block, 2) } else { 0.0 },
        });
    }

    /// With a zero point, the weight of the largest magnitude becomes the lowest quant: there
    /// is one more below the zero point than above.
    fn quantize(weights: &[f32], block: &mut [u8; N]) {
        let zero = f32::from(<Self as Format<N>>::ZERO);
        let (scale, min) = if MIN {
            let (low, high) = range(weights);
            let min = write_f16(block, 2, low);
            ((high - min) / Self::MOST, min)
        } else {
            (largest(weights) / -zero, 0.0)
        };
        let scale = write_f16(block, 0, scale);
        let quants = std::array::from_fn(|i| quant(weights[i] - min, scale, zero, Self::MOST));
        write_nibbles(&mut block[Self::LOW..], &quants);
        if BITS == 5 {
            write_fifth_bits(&mut block[Self::HIGH..], &quants);
        }
    }
}

impl Format<34> for Q8_0 {
    const LEN: usize = GROUP;
    const ZERO: u8 = 128;

    /// Stored signed: flipping the top bit adds 128.
    #[inline]
    fn unpack(block: &[u8; 34], mut each: impl FnMut(&Group)) {
        each(&Group {
            quants: std::array::from_fn(|i| block[2 + i] ^ 0x80),
            scales: [read_f16(block, 0); 2],
            min: 0.0,
        });
    }

    fn quantize(weights: &[f32], block: &mut [u8; 34]) {
        let d = write_f16(block, 0, largest(weights).abs() / 127.0);
        for (byte, &weight) in block[2..].iter_mut().zip(weights) {
            *byte = quant(weight, d, 128.0, 255.0) ^ 0x80;
        }
    }
}

#[inline]
fn nibbles(qs: &[u8]) -> [u8; GROUP] {
    let mut quants = [0; GROUP];
    let (low, high) = quants.split_at_mut(GROUP / 2);
    for ((low, high), &q) in low.iter_mut().zip(high).zip(qs) {
        *low = q & 0xf;
        *high = q >> 4;
    }
    quants
}

fn write_nibbles(qs: &mut [u8], quants: &[u8; GROUP]) {
    let (low, high) = quants.split_at(GROUP / 2);
    for ((q, &low), &high) in qs.iter_mut().zip(low).zip(high) {
        *q = (low & 0xf) | (high & 0xf) << 4;
    }
}

/// Bit i of the four bytes is the fifth bit of weight i.
#[inline]
fn add_fifth_bits(quants: &mut [u8; GROUP], bits: &[u8]) {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    for (i, q) in quants.iter_mut().enumerate() {
        *q |= ((bits >> i) as u8 & 1) << 4;
    }
}

fn write_fifth_bits(bytes: &mut [u8], quants: &[u8; GROUP]) {
    let bits = (0..GROUP).fold(0u32, |bits, i| bits | u32::from(quants[i] >> 4) << i);
    bytes[..4].copy_from_slice(&bits.to_le_bytes());
}
