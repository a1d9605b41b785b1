//! What the parts of sums are rounded to on the wire.

use half::bf16;

/// Numbers of a block of int8, with one scale.
const BLOCK: usize = 32;
/// Bytes of a whole block.
const BLOCK_BYTES: usize = size_of::<f32>() + BLOCK;
/// A block without a greater number is nothing but zeros: the inverse of its scale could be
/// infinite.
const LEAST: f32 = 1e-30;
/// 1.5 · 2²³: a number below 2²² that it is added to and taken from is rounded to an integer, ties
/// to even.
const ROUND: f32 = 12_582_912.0;

/// What the parts of sums are rounded to between ranks. It changes results: every rank adds up
/// the rounded parts, its own among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Payload {
    /// Not at all: the bits of a group in shared memory.
    #[default]
    F32,
    /// Brain floats: half the bytes.
    Bf16,
    /// int8 with a scale for every 32: 3.6 times fewer bytes.
    Int8,
}

impl Payload {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// Its name: `f32`, `bf16` or `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of `len` numbers.
    pub const fn bytes(self, len: usize) -> usize {
        match self {
            Self::F32 => 4 * len,
            Self::Bf16 => 2 * len,
            Self::Int8 => len + size_of::<f32>() * len.div_ceil(BLOCK),
        }
    }

    /// Appends `x` to `out`, and makes of it what [`decode`](Self::decode) will.
    pub(crate) fn encode(self, x: &mut [f32], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + self.bytes(x.len()), 0);
        let out = &mut out[start..];
        match self {
            Self::F32 => {
                for (out, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
                    *out = x.to_le_bytes();
                }
            }
            Self::Bf16 => {
                for (out, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
                    let half = bf16::from_f32(*x);
                    *out = half.to_le_bytes();
                    *x = half.to_f32();
                }
            }
            Self::Int8 => {
                for (out, x) in out.chunks_mut(BLOCK_BYTES).zip(x.chunks_mut(BLOCK)) {
                    encode_block(x, out);
                    decode_block(out, x);
                }
            }
        }
    }

    /// Writes the numbers that are in `bytes`, [so many](Self::bytes) as `out` has.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            Self::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            Self::Int8 => {
                for (bytes, out) in bytes.chunks(BLOCK_BYTES).zip(out.chunks_mut(BLOCK)) {
                    decode_block(bytes, out);
                }
            }
        }
    }
}

/// A block with a number that is none becomes NaN as a whole, by its scale.
fn encode_block(x: &[f32], out: &mut [u8]) {
    let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
    let greatest = f32::from_bits(x.iter().map(magnitude).max().unwrap_or(0));
    let (scale, inverse) = match greatest {
        _ if !greatest.is_finite() => (f32::NAN, 0.0),
        _ if greatest < LEAST => (0.0, 0.0),
        _ => (greatest / 127.0, 127.0 / greatest),
    };
    let (head, values) = out.split_at_mut(size_of::<f32>());
    head.copy_from_slice(&scale.to_le_bytes());
    for (out, x) in values.iter_mut().zip(x) {
        *out = ((x * inverse + ROUND) - ROUND) as i8 as u8;
    }
}

fn decode_block(bytes: &[u8], out: &mut [f32]) {
    let Some((scale, values)) = bytes.split_first_chunk() else {
        return;
    };
    let scale = f32::from_le_bytes(*scale);
    for (out, value) in out.iter_mut().zip(values) {
        *out = f32::from(*value as i8) * scale;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    /// What comes of `x` at the sender and at a receiver, which must agree.
    fn through(payload: Payload, x: &[f32]) -> Vec<f32> {
        let (mut own, mut bytes) = (x.to_vec(), vec![9; 3]);
        payload.encode(&mut own, &mut bytes);
        assert_eq!(bytes.len(), 3 + payload.bytes(x.len()));
        let mut theirs = vec![7.0; x.len()];
        payload.decode(&bytes[3..], &mut theirs);
        assert_eq!(bits(&own), bits(&theirs), "{payload:?}");
        own
    }

    proptest! {
        #[test]
        fn sender_and_receiver_have_the_same_bits(words in prop::collection::vec(any::<u32>(), 0..100)) {
            let x: Vec<f32> = words.into_iter().map(f32::from_bits).collect();
            let exact = through(Payload::F32, &x);
            prop_assert_eq!(bits(&exact), bits(&x));
            through(Payload::Bf16, &x);
            through(Payload::Int8, &x);
        }

        #[test]
        fn rounding_is_near(x in prop::collection::vec(-1e4f32..1e4, 0..100)) {
            for (x, rounded) in x.iter().zip(through(Payload::Bf16, &x)) {
                prop_assert!((x - rounded).abs() <= x.abs() / 256.0);
            }
            let rounded = through(Payload::Int8, &x);
            for (x, rounded) in x.chunks(BLOCK).zip(rounded.chunks(BLOCK)) {
                let greatest = x.iter().fold(0f32, |max, x| max.max(x.abs()));
                for (x, rounded) in x.iter().zip(rounded) {
                    prop_assert!((x - rounded).abs() <= greatest / 253.0);
                }
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_oddities_stay() {
        let x = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::INFINITY, -0.0];
        let rounded = through(Payload::Bf16, &x);
        assert_eq!(
            bits(&rounded),
            bits(&[1.0, 1.0 + 4.0 / 256.0, f32::INFINITY, -0.0])
        );
        assert!(through(Payload::Bf16, &[f32::NAN])[0].is_nan());
        let mut x = [1.0; 40];
        x[3] = f32::NEG_INFINITY;
        let rounded = through(Payload::Int8, &x);
        assert!(rounded[..BLOCK].iter().all(|x| x.is_nan()));
        assert!(rounded[BLOCK..].iter().all(|&x| x == 1.0));
        assert!(through(Payload::Int8, &[f32::MIN_POSITIVE, 0.0]) == [0.0; 2]);
        // 127 of 127, and a tie each way.
        let x = [127.0, 2.5, -3.5];
        assert_eq!(through(Payload::Int8, &x), [127.0, 2.0, -4.0]);
    }
}
