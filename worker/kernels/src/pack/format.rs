//! How packed weights are stored.

use super::{STRIP, TILE};
use crate::quant::Precision;

/// How a matrix stores its weights: unsigned quants `q` with f16 scales `d` and minima `m`, or
/// floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4 bits around 8, one scale per 32: `d * (q - 8)`.
    U4Zero,
    /// 4 bits, scale and minimum per 32: `d * q + m`.
    U4Min,
    /// 8 bits around a zero point, `q - zero` in [-128, 127], one scale per 32: `d * (q - zero)`.
    U8Zero(u8),
    /// 8 bits, scale and minimum per 32: `d * q + m`.
    U8Min,
    /// 8 bits around a zero point, `q - zero` in [-128, 127], one scale per 16.
    U8Halves(u8),
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
}

impl Format {
    /// How the activations are kept that it is multiplied with.
    pub const fn precision(self) -> Precision {
        if self.is_float() {
            Precision::F32
        } else {
            Precision::Int8
        }
    }

    pub(super) const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Columns of a tile.
    pub(crate) const fn tile_columns(self) -> usize {
        if self.is_float() { 1 } else { TILE }
    }

    /// Bytes of a tile.
    pub(crate) const fn tile_bytes(self) -> usize {
        let per_row = match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            _ => return self.head_bytes() + self.vectors() * 64,
        };
        per_row * STRIP
    }

    /// 64-byte vectors of quants in a tile.
    pub(crate) const fn vectors(self) -> usize {
        match self {
            Self::U4Zero | Self::U4Min => 4,
            _ => 8,
        }
    }

    /// Bytes of f16 before the quants: a vector of scales, then one of minima or of the scales
    /// of the second halves.
    pub(crate) const fn head_bytes(self) -> usize {
        let vectors = match self {
            Self::U4Zero | Self::U8Zero(_) => 1,
            _ => 2,
        };
        vectors * 2 * STRIP
    }

    /// The stored quant that stands for 0: the kernels know only 128 for eight
    /// bits, to which packing moves the format's own.
    pub(crate) const fn stored_zero(self) -> u8 {
        match self {
            Self::U4Zero => 8,
            Self::U8Zero(_) | Self::U8Halves(_) => 128,
            _ => 0,
        }
    }

    /// What packing adds to a quant, modulo 256.
    pub(crate) const fn shift(self) -> u8 {
        match self {
            Self::U8Zero(zero) | Self::U8Halves(zero) => self.stored_zero().wrapping_sub(zero),
            _ => 0,
        }
    }
}
