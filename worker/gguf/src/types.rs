//! The tensor types of GGUF that Shoal computes with.

use std::fmt;

/// The type of a tensor: plain floats or blocks of quantised weights.
///
/// `Qb_0` blocks have a scale, `Qb_1` a scale and a minimum; `Qb_K` are super-blocks of 256
/// weights whose group scales are quantised themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)] // The names that the field knows them by.
pub enum GgmlType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// 4 bits, scale.
    Q4_0,
    /// 4 bits, scale and minimum.
    Q4_1,
    /// 5 bits, scale.
    Q5_0,
    /// 5 bits, scale and minimum.
    Q5_1,
    /// 8 bits, scale.
    Q8_0,
    /// 4 bits, 6-bit scale and minimum per 32 weights.
    Q4_K,
    /// 5 bits, 6-bit scale and minimum per 32 weights.
    Q5_K,
    /// 6 bits, 8-bit scale per 16 weights.
    Q6_K,
}

/// What GGUF says of a type: id, name, weights per block, bytes per block.
const TABLE: [(GgmlType, u32, &str, usize, usize); 11] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::BF16, 30, "BF16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
];

impl GgmlType {
    /// Every type, plain floats first.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Self, u32, &'static str, usize, usize) {
        &TABLE[self as usize]
    }

    /// The type with this number in a tensor's header.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// The number in a tensor's header.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// The field's name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Weights per block; 1 for plain floats. A row is a whole number of blocks.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of `len` weights.
    ///
    /// # Panics
    /// Unless `len` is a whole number of blocks.
    pub fn bytes_of(self, len: usize) -> usize {
        assert!(
            len.is_multiple_of(self.block_len()),
            "{len} weights are no whole number of {self} blocks"
        );
        len / self.block_len() * self.block_bytes()
    }

    /// Whether the weights are integers with scales, not plain floats.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The names of ggml's types that Shoal does not compute with, for messages.
pub(crate) fn foreign_name(id: u32) -> Option<&'static str> {
    Some(match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (index, ty) in GgmlType::all().enumerate() {
            assert_eq!(ty as usize, index);
            assert_eq!(format!("{ty:?}"), ty.name());
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
            assert_eq!(foreign_name(ty.id()), None);
        }
        assert_eq!(GgmlType::from_id(10), None);
    }

    #[test]
    fn sizes() {
        assert_eq!(GgmlType::Q4_1.bytes_of(576), 360);
        assert_eq!(GgmlType::Q6_K.bytes_of(512), 420);
        assert_eq!(GgmlType::BF16.bytes_of(3), 6);
    }
}
