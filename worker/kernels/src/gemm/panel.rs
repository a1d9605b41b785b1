//! Panels: the weights of some strips, made ready for one product and used by all its rows.
//!
//! As pairs of brain floats, a weight is `fma(1 + q / 2^b, 2^b * scale, minimum - 2^b * scale)` for a quant of `b` bits,
//! where a format with a zero point has `-zero * scale` for its minimum: the quant need only be
//! moved into the mantissa of 1. That is exact but for the minima, whose difference is rounded,
//! and then rounded to bf16. Scales are multiples of 2⁻²⁴, and so are weights: none is subnormal.

use super::dot::Dot;
use crate::bf16::Pairs;
use crate::pack::{Format, STRIP};

/// Sixteen words: a pair of columns for each row of a strip.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct Words([u32; STRIP]);

/// Memory for panels, kept from one to the next.
#[derive(Default)]
pub(crate) struct Panel(Vec<Words>);

impl Panel {
    /// Room for `strips` strips of `k` columns.
    pub(super) fn room(&mut self, strips: usize, k: usize) -> *mut u32 {
        self.words(strips * k / 2).as_mut_ptr().cast()
    }

    /// Room for so many bytes.
    pub(super) fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        let words = self.words(bytes.div_ceil(size_of::<Words>()));
        // SAFETY: any words are valid as bytes, and there are as many.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), bytes) }
    }

    fn words(&mut self, words: usize) -> &mut [Words] {
        if self.0.len() < words {
            self.0.resize(words, Words::default());
        }
        &mut self.0
    }
}

/// Writes a strip of quants as `[k / 2][STRIP]` pairs.
///
/// # Safety
/// As [`Dot`]; `strip` is one of `format`, and `out` has room for its pairs.
#[inline(always)]
pub(super) unsafe fn widen<L: Dot, P: Pairs<L>>(format: Format, strip: &[u8], out: *mut u32) {
    // SAFETY: the contract of this function.
    unsafe {
        match format {
            Format::U4Zero | Format::U4Min => tiles::<L, P, 4>(format, strip, out),
            _ => tiles::<L, P, 8>(format, strip, out),
        }
    }
}

/// # Safety
/// As [`widen`], for a format of `BITS` bits.
#[inline(always)]
unsafe fn tiles<L: Dot, P: Pairs<L>, const BITS: u32>(
    format: Format,
    strip: &[u8],
    mut out: *mut u32,
) {
    let head = format.head_bytes();
    let steps = (1u32 << BITS) as f32;
    let zero = f32::from(format.stored_zero());
    for tile in strip.chunks_exact(format.tile_bytes()) {
        let (first, quants) = (tile.as_ptr(), tile[head..].as_ptr());
        // SAFETY: the contract of this function; a tile has its heads and vectors.
        unsafe {
            let low = L::f16(first);
            let (mut high, mut min) = (low, low.mul(L::splat(-zero)));
            match format {
                Format::U4Min | Format::U8Min => min = L::f16(first.add(2 * STRIP)),
                Format::U8Halves(_) => high = L::f16(first.add(2 * STRIP)),
                _ => {}
            }
            for vector in 0..format.vectors() {
                let scale = if vector < format.vectors() / 2 {
                    low
                } else {
                    high
                };
                if let Format::U8Halves(_) = format {
                    min = scale.mul(L::splat(-zero));
                }
                let scale = scale.mul(L::splat(steps));
                let offset = min.sub(scale);
                let words = quants.add(64 * vector);
                // Four bits: the second half of the columns is in the high nibbles.
                for pair in 0..16 / BITS as usize {
                    let at = 16 * (pair as u32 % 2) + 4 * (pair as u32 / 2);
                    let even = L::one_and::<BITS>(words, at).fma(scale, offset);
                    let odd = L::one_and::<BITS>(words, at + 8).fma(scale, offset);
                    P::round(even, odd, out);
                    out = out.add(STRIP);
                }
            }
        }
    }
}
