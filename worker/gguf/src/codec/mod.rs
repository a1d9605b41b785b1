//! The block formats: from bytes to quants and scales, to floats, and back.
//!
//! Every quantised format is read as [`Group`]s of 32 weights, by [`unpack`]; that is the
//! view from which packers build their own layouts, and from which [`dequantize`] makes
//! floats with exactly the arithmetic of ggml.

mod block;
mod float;
mod kquant;
mod legacy;
#[cfg(test)]
mod tests;

use crate::GgmlType;

/// Weights in a [`Group`].
pub const GROUP: usize = 32;

/// 32 consecutive weights of a row: `weight[i] = scales[i / 16] * (quants[i] - zero) + min`,
/// where `zero` is [`zero_point`] of the type.
///
/// Scales and minimum are exact in f32. Either `zero` is not 0 or the minimum may not be:
/// no type has both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Unsigned quants of as many bits as the type's name says.
    pub quants: [u8; GROUP],
    /// Scales of the first and the second 16 weights; unequal in Q6_K alone.
    pub scales: [f32; 2],
    /// What a quant of 0 stands for in the types without a zero point.
    pub min: f32,
}

/// The quant that stands for 0; itself 0 in the types that have a minimum instead.
/// `None` for plain floats.
pub fn zero_point(ty: GgmlType) -> Option<u8> {
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => None,
        GgmlType::Q4_0 => Some(8),
        GgmlType::Q5_0 => Some(16),
        GgmlType::Q8_0 => Some(128),
        GgmlType::Q6_K => Some(32),
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => Some(0),
    }
}

/// A quantised format.
trait Format<const BYTES: usize> {
    /// Weights per block.
    const LEN: usize;
    /// See [`zero_point`].
    const ZERO: u8;
    /// Calls `each` with the groups of a block in order.
    fn unpack(block: &[u8; BYTES], each: impl FnMut(&Group));
    /// Quantises [`LEN`](Self::LEN) weights.
    fn quantize(weights: &[f32], block: &mut [u8; BYTES]);
}

/// Names the [`Format`] of a quantised type: `$body` is compiled once per format, with `$F`
/// the format and `$N` its block's bytes; plain floats take `$plain`.
macro_rules! with_format {
    ($ty:expr, <$F:ident, $N:ident> $body:expr, $plain:expr) => {{
        macro_rules! with {
            ($format:ty, $bytes:literal) => {{
                type $F = $format;
                const $N: usize = $bytes;
                $body
            }};
        }
        match $ty {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => $plain,
            GgmlType::Q4_0 => with!(legacy::Q4_0, 18),
            GgmlType::Q4_1 => with!(legacy::Q4_1, 20),
            GgmlType::Q5_0 => with!(legacy::Q5_0, 22),
            GgmlType::Q5_1 => with!(legacy::Q5_1, 24),
            GgmlType::Q8_0 => with!(legacy::Q8_0, 34),
            GgmlType::Q4_K => with!(kquant::Q4_K, 144),
            GgmlType::Q5_K => with!(kquant::Q5_K, 176),
            GgmlType::Q6_K => with!(kquant::Q6_K, 210),
        }
    }};
}

/// Calls `each(index, group)` for the groups of a row, or of any run of whole blocks, in
/// order.
///
/// # Panics
/// If `ty` is not quantised, or `data` is no whole number of blocks.
pub fn unpack(ty: GgmlType, data: &[u8], mut each: impl FnMut(usize, &Group)) {
    let mut index = 0;
    let mut numbered = |group: &Group| {
        each(index, group);
        index += 1;
    };
    with_format!(
        ty,
        <F, N> for block in whole_blocks::<N>(ty, data) {
            F::unpack(block, &mut numbered);
        },
        panic!("{ty} has no blocks to unpack")
    );
}

/// Turns whole blocks into floats, bit for bit as ggml does.
///
/// # Panics
/// Unless `data` is a whole number of blocks and `out` as long as their weights.
pub fn dequantize(ty: GgmlType, data: &[u8], out: &mut [f32]) {
    assert_eq!(
        data.len(),
        ty.bytes_of(out.len()),
        "bytes of {} weights of {ty}",
        out.len()
    );
    with_format!(
        ty,
        <F, N> {
            let mut groups = out.as_chunks_mut::<GROUP>().0.iter_mut();
            for block in whole_blocks::<N>(ty, data) {
                F::unpack(block, |group| {
                    if let Some(out) = groups.next() {
                        group.dequantize(<F as Format<N>>::ZERO, out);
                    }
                });
            }
        },
        float::decode(ty, data, out)
    );
}

/// Quantises weights by rounding to the range of each block: for tools and tests, not for
/// the best quality that a format can give.
///
/// The weights must be finite and within the range of f16.
///
/// # Panics
/// Unless `weights` is a whole number of blocks.
pub fn quantize(ty: GgmlType, weights: &[f32]) -> Vec<u8> {
    let mut data = vec![0; ty.bytes_of(weights.len())];
    with_format!(
        ty,
        <F, N> {
            let blocks = data.as_chunks_mut::<N>().0;
            for (weights, block) in weights.chunks_exact(<F as Format<N>>::LEN).zip(blocks) {
                F::quantize(weights, block);
            }
        },
        float::encode(ty, weights, &mut data)
    );
    data
}

impl Group {
    /// The sums and products in ggml's order. Adding a minimum of 0 would turn -0 into 0, so
    /// the types without one do not.
    #[inline]
    fn dequantize(&self, zero: u8, out: &mut [f32; GROUP]) {
        for ((half, quants), scale) in out
            .chunks_exact_mut(GROUP / 2)
            .zip(self.quants.chunks_exact(GROUP / 2))
            .zip(self.scales)
        {
            for (out, &q) in half.iter_mut().zip(quants) {
                *out = if zero == 0 {
                    scale * f32::from(q) + self.min
                } else {
                    scale * f32::from(i16::from(q) - i16::from(zero))
                };
            }
        }
    }
}

fn whole_blocks<const N: usize>(ty: GgmlType, data: &[u8]) -> &[[u8; N]] {
    let (blocks, rest) = data.as_chunks::<N>();
    assert!(
        rest.is_empty(),
        "{} bytes are no whole number of {ty} blocks",
        data.len()
    );
    blocks
}
