//! The instruction sets that kernels are written for.

use std::sync::OnceLock;

/// An instruction set, from the least to the most able of an architecture. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, on every machine.
    Scalar,
    /// 64-bit ARM with NEON and its dot products.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// The same with AVX-512 BF16.
    Avx512Bf16,
}

impl Isa {
    /// Every instruction set, available or not.
    pub const ALL: [Self; 5] = [
        Self::Scalar,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
    ];

    /// The best that this machine has.
    #[inline]
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(best)
    }

    /// Those that this machine has, best last.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this machine has it.
    #[inline]
    pub fn is_available(self) -> bool {
        // The sets of x86-64 come after NEON and do not have it.
        self <= Self::detect() && (self != Self::Neon || cfg!(target_arch = "aarch64"))
    }

    /// Itself, once checked: what every dispatcher calls before it enters a kernel.
    ///
    /// # Panics
    /// If this machine lacks it.
    #[inline]
    pub(crate) fn checked(self) -> Self {
        assert!(self.is_available(), "this machine has no {self:?}");
        self
    }
}

#[cfg(target_arch = "x86_64")]
fn best() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512, is_x86_feature_detected!("avx512bf16")) {
        (true, true, true) => Isa::Avx512Bf16,
        (true, true, false) => Isa::Avx512,
        (true, false, _) => Isa::Avx2,
        (false, ..) => Isa::Scalar,
    }
}

#[cfg(target_arch = "aarch64")]
fn best() -> Isa {
    use std::arch::is_aarch64_feature_detected;
    match is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod") {
        true => Isa::Neon,
        false => Isa::Scalar,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn best() -> Isa {
    Isa::Scalar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_everywhere_and_the_best_is_last() {
        let all: Vec<Isa> = Isa::available().collect();
        assert_eq!(all.first(), Some(&Isa::Scalar));
        assert_eq!(all.last(), Some(&Isa::detect()));
    }

    #[test]
    fn no_machine_is_of_two_architectures() {
        assert_eq!(Isa::Neon.is_available(), Isa::detect() == Isa::Neon);
    }
}
