//! Whether the tile unit can be used, asked once in a process.

use std::sync::OnceLock;

/// What the use of tiles fails for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// The program is not for Linux on x86-64.
    Platform,
    /// The processor has no tiles of 16 rows of 64 bytes, or no products of them.
    Processor,
    /// The system does not keep tiles for a thread.
    System,
    /// The system denies them to this process.
    Permission,
    /// The unit's sums differ from those of tile order.
    Order,
}

/// Whether this process can use the tile unit.
#[inline]
pub fn available() -> bool {
    state().is_ok()
}

/// Nothing, or what the use of tiles fails for.
///
/// The first call asks the system for permission, which holds for all threads of the process,
/// and tries the unit on a product whose bits are known.
pub fn state() -> Result<(), Lack> {
    static STATE: OnceLock<Result<(), Lack>> = OnceLock::new();
    *STATE.get_or_init(ask)
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn ask() -> Result<(), Lack> {
    Err(Lack::Platform)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use asked::ask;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod asked {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    use super::super::{Product, TILE, order, unit};
    use super::Lack;
    use crate::Isa;
    use crate::gemm::{Outputs, Write};

    /// CPUID 7.0, EDX: tiles, and their products of brain floats.
    const PRODUCTS: u32 = 1 << 24 | 1 << 22;

    /// CPUID 1, ECX: the system has enabled XGETBV.
    const OSXSAVE: u32 = 1 << 27;

    /// XCR0: the configuration of tiles and their data.
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;

    /// Asks for a state that the system gives on demand only (Linux, `arch_prctl`).
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;

    /// The state's number: that of its bit in XCR0.
    const TILE_DATA: libc::c_long = 18;

    pub(super) fn ask() -> Result<(), Lack> {
        if !products() {
            return Err(Lack::Processor);
        }
        if __cpuid(1).ecx & OSXSAVE == 0 {
            return Err(Lack::System);
        }
        // SAFETY: OSXSAVE says that XGETBV is enabled.
        if unsafe { xcr0() } & TILE_STATE != TILE_STATE {
            return Err(Lack::System);
        }
        // SAFETY: the call takes numbers alone and changes no memory of ours.
        let denied = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) };
        if denied != 0 {
            return Err(Lack::Permission);
        }
        // SAFETY: the processor has the unit and the system grants it.
        if unsafe { in_order() } {
            Ok(())
        } else {
            Err(Lack::Order)
        }
    }

    /// Whether the processor has the products, on tiles as large as ours (palette 1).
    fn products() -> bool {
        if __cpuid(0).eax < 0x1d || __cpuid_count(7, 0).edx & PRODUCTS != PRODUCTS {
            return false;
        }
        let palette = __cpuid_count(0x1d, 1);
        let (tile_bytes, row_bytes, tiles, rows) = (
            palette.eax >> 16,
            palette.ebx & 0xffff,
            palette.ebx >> 16,
            palette.ecx & 0xffff,
        );
        __cpuid_count(0x1d, 0).eax >= 1
            && tile_bytes as usize == 4 * TILE
            && (row_bytes, rows) == (64, 16)
            && tiles >= 8
    }

    /// # Safety
    /// The system has enabled XGETBV.
    #[target_feature(enable = "xsave")]
    unsafe fn xcr0() -> u64 {
        // SAFETY: the contract of this function.
        unsafe { _xgetbv(0) }
    }

    /// Whether the unit gives the bits of [`order`], for two groups, one of them short, and two
    /// panels. The numbers are such that other orders round otherwise somewhere.
    ///
    /// # Safety
    /// The process may use tiles.
    unsafe fn in_order() -> bool {
        const ROWS: usize = 27;
        const N: usize = 32;
        const BLOCKS: usize = 2;
        let mut state = 1u32;
        // Magnitudes from 2⁻⁴ to 2⁴ with all digits, of both signs.
        let mut half = || {
            state = state.wrapping_mul(0x2c92_77b5).wrapping_add(0xac56_4b05);
            let random = state >> 8;
            (random & 0x807f) | (123 + (random >> 16) % 8) << 7
        };
        let mut words = || [0; 2 * BLOCKS * TILE].map(|_: u32| half() | half() << 16);
        let (acts, weights) = (words(), words());
        let panels = [weights.as_ptr(), weights[BLOCKS * TILE..].as_ptr()];
        let (mut ours, mut theirs) = ([0f32; ROWS * N], [0f32; ROWS * N]);
        let mut product = Product {
            panels: &panels,
            n: N,
            blocks: BLOCKS,
            acts: acts.as_ptr(),
            rows: ROWS,
            out: Outputs {
                start: ours.as_mut_ptr(),
                stride: N,
                write: Write::Set,
            },
        };
        // SAFETY: two groups and two panels of as many blocks, and room for the outputs.
        unsafe {
            order::multiply(Isa::detect(), &product);
            product.out.start = theirs.as_mut_ptr();
            unit::multiply(&product);
        }
        ours.map(f32::to_bits) == theirs.map(f32::to_bits)
    }
}
