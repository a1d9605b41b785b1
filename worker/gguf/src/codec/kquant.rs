//! The super-blocks of 256 weights whose group scales are quantised themselves.

#![allow(non_camel_case_types)] // Named as the types are.

use super::block::{largest, quant, range, read_f16, write_f16};
use super::{Format, GROUP, Group};

const LEN: usize = 256;
const GROUPS: usize = LEN / GROUP;

/// `d: f16, dmin: f16, scales: [u8; 12], qs: [u8; 128]`.
pub(super) struct Q4_K;
/// `d: f16, dmin: f16, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128]`.
pub(super) struct Q5_K;
/// `ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: f16`.
pub(super) struct Q6_K;

impl Format<144> for Q4_K {
    const LEN: usize = LEN;
    const ZERO: u8 = 0;

    #[inline]
    fn unpack(block: &[u8; 144], mut each: impl FnMut(&Group)) {
        for g in 0..GROUPS {
            each(&group_with_min(block, g, nibbles(&block[16..], g)));
        }
    }

    fn quantize(weights: &[f32], block: &mut [u8; 144]) {
        let quants = quantize_with_min(weights, block, 15.0);
        write_nibbles(&mut block[16..], &quants);
    }
}

impl Format<176> for Q5_K {
    const LEN: usize = LEN;
    const ZERO: u8 = 0;

    /// Bit g of byte i of `qh` is the fifth bit of weight i of group g.
    #[inline]
    fn unpack(block: &[u8; 176], mut each: impl FnMut(&Group)) {
        let high = &block[16..48];
        for g in 0..GROUPS {
            let mut quants = nibbles(&block[48..], g);
            for (q, &h) in quants.iter_mut().zip(high) {
                *q |= ((h >> g) & 1) << 4;
            }
            each(&group_with_min(block, g, quants));
        }
    }

    fn quantize(weights: &[f32], block: &mut [u8; 176]) {
        let quants = quantize_with_min(weights, block, 31.0);
        write_nibbles(&mut block[48..], &quants);
        for (i, high) in block[16..48].iter_mut().enumerate() {
            *high = (0..GROUPS).fold(0, |bits, g| bits | (quants[g][i] >> 4) << g);
        }
    }
}

impl Format<210> for Q6_K {
    const LEN: usize = LEN;
    const ZERO: u8 = 32;

    /// Four groups share 64 bytes of low nibbles and 32 bytes of high bit pairs: group p of
    /// the four has bit pair p of every byte, and the low or high nibbles of its 32 bytes.
    #[inline]
    fn unpack(block: &[u8; 210], mut each: impl FnMut(&Group)) {
        let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
        let d = read_f16(block, 208);
        for g in 0..GROUPS {
            let (half, part) = (g / 4, g % 4);
            let low = &low[64 * half + 32 * (part % 2)..][..GROUP];
            let high = &high[32 * half..][..GROUP];
            let (low_shift, high_shift) = (4 * (part / 2), 2 * part);
            each(&Group {
                quants: std::array::from_fn(|i| {
                    (low[i] >> low_shift) & 0xf | ((high[i] >> high_shift) & 3) << 4
                }),
                scales: [0, 1].map(|h| d * f32::from(scales[2 * g + h] as i8)),
                min: 0.0,
            });
        }
    }

    fn quantize(weights: &[f32], block: &mut [u8; 210]) {
        let halves = weights.chunks_exact(GROUP / 2);
        let wanted: Vec<f32> = halves.clone().map(|w| largest(w).abs() / 31.0).collect();
        let d = write_f16(block, 208, largest(&wanted) / 127.0);
        for (h, (weights, wanted)) in halves.zip(wanted).enumerate() {
            let scale = steps_up(wanted, d, 127.0);
            block[192 + h] = scale;
            let (half, part) = (h / 8, h / 2 % 4);
            for (i, &weight) in weights.iter().enumerate() {
                let q = quant(weight, d * f32::from(scale), 32.0, 63.0);
                let i = 16 * (h % 2) + i;
                block[64 * half + 32 * (part % 2) + i] |= (q & 0xf) << (4 * (part / 2));
                block[128 + 32 * half + i] |= (q >> 4) << (2 * part);
            }
        }
    }
}

/// The low 4 bits of group `g`: two groups share 32 bytes, the even one has the low nibbles.
#[inline]
fn nibbles(qs: &[u8], g: usize) -> [u8; GROUP] {
    let qs = &qs[GROUP * (g / 2)..][..GROUP];
    let shift = 4 * (g % 2);
    std::array::from_fn(|i| (qs[i] >> shift) & 0xf)
}

fn write_nibbles(qs: &mut [u8], quants: &[[u8; GROUP]; GROUPS]) {
    for (pair, qs) in quants.chunks_exact(2).zip(qs.chunks_exact_mut(GROUP)) {
        for (i, q) in qs.iter_mut().enumerate() {
            *q = (pair[0][i] & 0xf) | (pair[1][i] & 0xf) << 4;
        }
    }
}

/// Puts scale and minimum of group `g` to its quants. The block starts with `d`, `dmin` and
/// the 6-bit factors.
#[inline]
fn group_with_min(block: &[u8], g: usize, quants: [u8; GROUP]) -> Group {
    let (scale, min) = factors(&block[4..16], g);
    Group {
        quants,
        scales: [read_f16(block, 0) * f32::from(scale); 2],
        min: -(read_f16(block, 2) * f32::from(min)),
    }
}

/// The 6-bit factors of scale and minimum of group `g`. Those of the first four groups are
/// the low 6 bits of bytes 0..4 and 4..8; the others have their low nibbles in bytes 8..12
/// and their high bit pairs on top of the first eight bytes.
#[inline]
fn factors(packed: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        (packed[g] & 63, packed[g + 4] & 63)
    } else {
        let (low, i) = (packed[g + 4], g - 4);
        (
            low & 0xf | packed[i] >> 6 << 4,
            low >> 4 | packed[i + 4] >> 6 << 4,
        )
    }
}

fn write_factors(packed: &mut [u8], g: usize, scale: u8, min: u8) {
    if g < 4 {
        packed[g] |= scale;
        packed[g + 4] |= min;
    } else {
        packed[g + 4] = scale & 0xf | (min & 0xf) << 4;
        packed[g - 4] |= scale >> 4 << 6;
        packed[g] |= min >> 4 << 6;
    }
}

/// Writes `d`, `dmin` and the factors, and returns the quants in `0..=most`. Factors are
/// rounded up, so that every group's range covers its weights.
fn quantize_with_min(weights: &[f32], block: &mut [u8], most: f32) -> [[u8; GROUP]; GROUPS] {
    let groups: [&[f32]; GROUPS] = std::array::from_fn(|g| &weights[GROUP * g..][..GROUP]);
    let ranges = groups.map(range);
    let below = ranges.map(|(low, _)| (-low).max(0.0));
    let dmin = write_f16(block, 2, largest(&below) / 63.0);
    let mins = below.map(|below| steps_up(below, dmin, 63.0));
    let wanted: [f32; GROUPS] =
        std::array::from_fn(|g| (ranges[g].1 + dmin * f32::from(mins[g])).max(0.0) / most);
    let d = write_f16(block, 0, largest(&wanted) / 63.0);
    std::array::from_fn(|g| {
        let scale = steps_up(wanted[g], d, 63.0);
        write_factors(&mut block[4..16], g, scale, mins[g]);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(mins[g]));
        std::array::from_fn(|i| quant(groups[g][i] + min, scale, 0.0, most))
    })
}

/// The fewest steps that reach `value`, at most `most`.
fn steps_up(value: f32, step: f32, most: f32) -> u8 {
    if step == 0.0 {
        return 0;
    }
    (value / step).ceil().min(most) as u8
}
