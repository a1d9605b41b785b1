//! Tile order in software: the same bits as the tile unit's, on every instruction set.

use super::{Product, SIDE, TILE};
use crate::Isa;
use crate::simd::{Lanes, dispatch};

/// A product with the lanes of `isa`.
///
/// # Safety
/// The pointers are valid for what [`Product`] says of them, and no other thread writes what is
/// read or touches what is written.
///
/// # Panics
/// When the machine lacks `isa`.
pub(crate) unsafe fn multiply(isa: Isa, product: &Product<'_>) {
    debug_assert!(product.is_sound());
    // Rows whose sums, three each, stay in registers: 32 of 16 lanes, or 16 of 8.
    match isa {
        Isa::Avx512 | Isa::Avx512Bf16 => dispatch!(isa, rows::<_, 8>(product: &Product<'_>)),
        _ => dispatch!(isa, rows::<_, 2>(product: &Product<'_>)),
    }
}

/// # Safety
/// As [`multiply`] and [`Lanes`].
#[inline(always)]
unsafe fn rows<L: Lanes, const MOST: usize>(product: &Product<'_>) {
    for panel in 0..product.panels.len() {
        let mut row = 0;
        while row < product.rows {
            let left = product.rows - row;
            // Counts divide the side of a tile, so none crosses a group.
            // SAFETY: the contract of this function; the rows are there.
            row += unsafe {
                match left {
                    8.. if MOST >= 8 => strip::<L, 8>(product, panel, row),
                    4.. if MOST >= 4 => strip::<L, 4>(product, panel, row),
                    2.. => strip::<L, 2>(product, panel, row),
                    _ => strip::<L, 1>(product, panel, row),
                }
            };
        }
    }
}

/// `M` rows of a panel from `row` on, all in one group. Returns `M`.
///
/// # Safety
/// As [`rows`].
#[inline(always)]
unsafe fn strip<L: Lanes, const M: usize>(
    product: &Product<'_>,
    panel: usize,
    row: usize,
) -> usize {
    let at = row / SIDE * product.blocks * TILE + row % SIDE * SIDE;
    let weights = product.panels[panel];
    // SAFETY: the contract of this function; every index is inside a tile of a block that is there.
    unsafe {
        let acts = product.acts.add(at);
        let mut sums = [L::splat(0.0); M];
        for block in 0..product.blocks {
            let (weights, acts) = (weights.add(block * TILE), acts.add(block * TILE));
            let (mut even, mut odd) = ([L::splat(0.0); M], [L::splat(0.0); M]);
            for pair in 0..SIDE {
                let (low, high) = L::bf16_pairs(weights.add(pair * SIDE));
                for i in 0..M {
                    let by = *acts.add(i * SIDE + pair);
                    even[i] = low.fma(L::splat(f32::from_bits(by << 16)), even[i]);
                    odd[i] = high.fma(L::splat(f32::from_bits(by & 0xffff_0000)), odd[i]);
                }
            }
            for i in 0..M {
                sums[i] = sums[i].add(even[i].add(odd[i]));
            }
        }
        let out = product.out;
        for (i, sums) in sums.into_iter().enumerate() {
            let to = out.start.add((row + i) * out.stride + panel * SIDE);
            out.write.put(sums, product.width(panel), to);
        }
    }
    M
}
