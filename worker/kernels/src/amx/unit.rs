//! The kernel on tiles: two groups of rows times two strips, four sums of 16 by 16.
//!
//! By `asm!`, as the intrinsics are unstable. The compiler knows nothing of tiles beyond their
//! names, so that whatever lives in them lives within one block of it. The configuration is
//! loaded by every call and released at its end: a call takes hundreds of rows, and a thread
//! that has released its tiles is switched without them.

use std::arch::asm;
use std::ops::Range;

use super::{Product, SIDE, TILE};
use crate::Isa;
use crate::gemm::Write;
use crate::simd::{Lanes, dispatch};

/// The operand of LDTILECFG (Intel SDM, volume 2): palette 1, and of every tile its bytes in a
/// row and its rows.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Sums in tiles 0 to 3, activations in 4 and 5, weights in 6 and 7. What is short of rows
    /// or of outputs is neither read nor written.
    fn new(rows: [usize; 2], widths: [usize; 2]) -> Self {
        let mut config = Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        let [(upper, lower), (left, right)] = [rows, widths].map(|[a, b]| (a, b));
        let shapes = [
            (upper, left),
            (upper, right),
            (lower, left),
            (lower, right),
            (upper, SIDE),
            (lower, SIDE),
            (SIDE, left),
            (SIDE, right),
        ];
        for (i, (rows, words)) in shapes.into_iter().enumerate() {
            // A tile out of use must be empty in both directions.
            if rows > 0 && words > 0 {
                config.rows[i] = rows as u8;
                config.row_bytes[i] = 4 * words as u16;
            }
        }
        config
    }

    /// # Safety
    /// The process may use tiles.
    unsafe fn load(&self) {
        // SAFETY: 64 bytes of a valid configuration, as no tile exceeds 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, preserves_flags)) };
    }
}

/// Numbers between two rows of sums that wait to be added.
const PITCH: usize = 2 * SIDE;

/// Sums that wait to be added.
#[repr(align(64))]
struct Sums([f32; PITCH * PITCH]);

/// A product by the tile unit.
///
/// # Safety
/// [`state`](super::state) is fine. The pointers are valid for what [`Product`] says of them, and
/// no other thread writes what is read or touches what is written.
pub(crate) unsafe fn multiply(product: &Product<'_>) {
    debug_assert!(product.is_sound());
    let widths = [product.width(0), product.width(1)];
    let mut sums = Sums([0.0; PITCH * PITCH]);
    let mut configured = [0, 0];
    for first in (0..product.rows).step_by(2 * SIDE) {
        let left = product.rows - first;
        let rows = [left.min(SIDE), left.saturating_sub(SIDE).min(SIDE)];
        if configured != rows {
            // SAFETY: the process may use tiles.
            unsafe { Config::new(rows, widths).load() };
            configured = rows;
        }
        let to = product.out.start.wrapping_add(first * product.out.stride);
        let (to, stride) = match product.out.write {
            Write::Set => (to, product.out.stride),
            Write::Add => (sums.0.as_mut_ptr(), PITCH),
        };
        // SAFETY: the contract of this function. Rows and outputs past the last are no part of
        // the configuration; the sums that wait have a place for every tile.
        unsafe { tiles(product, first, to, stride) };
        if product.out.write == Write::Add {
            let (isa, from) = (Isa::detect(), &sums);
            let rows = first..first + rows[0] + rows[1];
            // SAFETY: the sums of these rows are there.
            dispatch!(isa, add::<_>(from: &Sums, rows: Range<usize>, product: &Product<'_>));
        }
    }
    // SAFETY: the process may use tiles, and nothing is left in them.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// Adds the sums of `rows` to what is there.
///
/// # Safety
/// As [`multiply`] and [`Lanes`].
#[inline(always)]
unsafe fn add<L: Lanes>(from: &Sums, rows: Range<usize>, product: &Product<'_>) {
    let out = product.out;
    for (row, sums) in rows.zip(from.0.chunks_exact(PITCH)) {
        for panel in 0..product.panels.len() {
            // SAFETY: the contract of this function; a row of sums is as wide as two panels.
            unsafe {
                let sums = L::load(sums.as_ptr().add(panel * SIDE));
                let to = out.start.add(row * out.stride + panel * SIDE);
                out.write.put(sums, product.width(panel), to);
            }
        }
    }
}

/// One pass over K in one block of `asm!`: zeroes sums, adds blocks up, stores the sums of the
/// first group, then those of the second.
macro_rules! pass {
    ($at:ident, [$($zero:literal),*], [$($step:literal),*], [$($upper:literal),*], [$($lower:literal),*]) => {
        asm!(
            $(concat!("tilezero ", $zero),)*
            "2:",
            $($step,)*
            "add {a0}, {tile}",
            "add {a1}, {tile}",
            "add {b0}, {tile}",
            "add {b1}, {tile}",
            "dec {blocks}",
            "jnz 2b",
            $(concat!("tilestored ", $upper),)*
            "add {c}, {group}",
            $(concat!("tilestored ", $lower),)*
            a0 = inout(reg) $at.acts[0] => _,
            a1 = inout(reg) $at.acts[1] => _,
            b0 = inout(reg) $at.panels[0] => _,
            b1 = inout(reg) $at.panels[1] => _,
            c = inout(reg) $at.out => _,
            blocks = inout(reg) $at.blocks => _,
            line = in(reg) 4 * SIDE,
            pitch = in(reg) 4 * $at.stride,
            group = in(reg) 4 * $at.stride * SIDE,
            tile = const 4 * TILE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// What a pass reads and writes.
struct Pass {
    acts: [*const u32; 2],
    panels: [*const u32; 2],
    blocks: usize,
    out: *mut f32,
    stride: usize,
}

/// The sums of up to two groups, the first of which begins with row `first`, to `out` with
/// `stride` numbers between rows.
///
/// # Safety
/// As [`multiply`], with the tiles configured for these rows and the outputs.
unsafe fn tiles(product: &Product<'_>, first: usize, out: *mut f32, stride: usize) {
    let group = product.blocks * TILE;
    let acts = product.acts.wrapping_add(first / SIDE * group);
    let at = Pass {
        acts: [acts, acts.wrapping_add(group)],
        panels: [product.panels[0], product.panels[product.panels.len() - 1]],
        blocks: product.blocks,
        out,
        stride,
    };
    // SAFETY: the contract of this function. Only tiles of groups and panels that are there are
    // loaded, as far as they are configured, and there is at least one block.
    unsafe {
        match (product.rows - first > SIDE, product.panels.len()) {
            (true, 2) => pass!(
                at,
                ["tmm0", "tmm1", "tmm2", "tmm3"],
                [
                    "tileloadd tmm4, [{a0} + 1*{line}]",
                    "tileloadd tmm6, [{b0} + 1*{line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a1} + 1*{line}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tileloadd tmm7, [{b1} + 1*{line}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7"
                ],
                ["[{c} + 1*{pitch}], tmm0", "[{c} + 1*{pitch} + 64], tmm1"],
                ["[{c} + 1*{pitch}], tmm2", "[{c} + 1*{pitch} + 64], tmm3"]
            ),
            (true, _) => pass!(
                at,
                ["tmm0", "tmm2"],
                [
                    "tileloadd tmm4, [{a0} + 1*{line}]",
                    "tileloadd tmm6, [{b0} + 1*{line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a1} + 1*{line}]",
                    "tdpbf16ps tmm2, tmm5, tmm6"
                ],
                ["[{c} + 1*{pitch}], tmm0"],
                ["[{c} + 1*{pitch}], tmm2"]
            ),
            (false, 2) => pass!(
                at,
                ["tmm0", "tmm1"],
                [
                    "tileloadd tmm4, [{a0} + 1*{line}]",
                    "tileloadd tmm6, [{b0} + 1*{line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b1} + 1*{line}]",
                    "tdpbf16ps tmm1, tmm4, tmm7"
                ],
                ["[{c} + 1*{pitch}], tmm0", "[{c} + 1*{pitch} + 64], tmm1"],
                []
            ),
            (false, _) => pass!(
                at,
                ["tmm0"],
                [
                    "tileloadd tmm4, [{a0} + 1*{line}]",
                    "tileloadd tmm6, [{b0} + 1*{line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ],
                ["[{c} + 1*{pitch}], tmm0"],
                []
            ),
        }
    }
}
