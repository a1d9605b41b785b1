//! What lies between the matrix products, where it is no part of one.

use std::ops::Range;

use crate::norm::rms_norm;
use crate::pool::Scatter;
use crate::quant::Activations;
use crate::team::Team;

/// Rows that one thread does at once; fewer are not worth waking another.
const ROWS: usize = 4;

/// Numbers that one thread adds or moves at once.
const NUMBERS: usize = 8192;

/// Fills every row of `width` numbers: `fill` gets its index and the row.
pub fn fill_rows(
    team: &mut Team,
    out: &mut [f32],
    width: usize,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows = out.len() / width;
    let out = Scatter::new(out);
    team.pool.phase(rows.div_ceil(ROWS), |item| {
        for row in item * ROWS..rows.min((item + 1) * ROWS) {
            // SAFETY: every row is one item's own.
            fill(row, unsafe { out.part(row * width, width) });
        }
    });
}

/// Adds `parts` to `x`, one after the other.
///
/// # Panics
/// When a part is shorter than `x`.
pub fn add(team: &mut Team, x: &mut [f32], parts: &[&[f32]]) {
    let len = x.len();
    assert!(parts.iter().all(|part| part.len() >= len));
    let x = Scatter::new(x);
    team.pool.phase(len.div_ceil(NUMBERS), |item| {
        let first = item * NUMBERS;
        // SAFETY: every item has its own numbers.
        let x = unsafe { x.part(first, NUMBERS.min(len - first)) };
        for part in parts {
            let part = &part[first..first + x.len()];
            x.iter_mut().zip(part).for_each(|(x, part)| *x += part);
        }
    });
}

/// Copies rows to `columns` of rows of `width` numbers.
///
/// # Panics
/// When they do not fit.
pub fn place(team: &mut Team, rows: &[f32], columns: Range<usize>, out: &mut [f32], width: usize) {
    let count = rows.len() / columns.len();
    assert!(columns.end <= width && count * width <= out.len());
    let pieces = columns.len().div_ceil(NUMBERS);
    let out = Scatter::new(out);
    team.pool.phase(count * pieces, |item| {
        let (row, first) = (item / pieces, item % pieces * NUMBERS);
        let len = NUMBERS.min(columns.len() - first);
        // SAFETY: every item has its own numbers.
        let to = unsafe { out.part(row * width + columns.start + first, len) };
        to.copy_from_slice(&rows[row * columns.len() + first..][..len]);
    });
}

/// Normalises the rows `x` of `weight.len()` numbers and quantises them to the first rows of `out`.
///
/// # Panics
/// When the shapes do not fit.
pub fn norm_quantize(team: &mut Team, x: &[f32], weight: &[f32], eps: f32, out: &mut Activations) {
    let (width, isa) = (weight.len(), team.isa);
    let rows = x.len() / width;
    assert!(rows <= out.rows() && width == out.k());
    let out = &*out;
    team.pool
        .phase_with(&mut team.scratch, rows.div_ceil(ROWS), |scratch, item| {
            let normal = &mut scratch.tile[..width];
            for row in item * ROWS..rows.min((item + 1) * ROWS) {
                rms_norm(isa, &x[row * width..][..width], weight, eps, normal);
                // SAFETY: every row is one item's own.
                unsafe { out.write_shared(isa, row, 0, normal) };
            }
        });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::testing::random;

    #[test]
    fn every_row_is_filled() {
        for (threads, rows) in [(1, 3), (2, 9), (3, 1), (2, 0)] {
            let mut team = Team::new(threads, Isa::Scalar, 64, 64).unwrap();
            let mut out = vec![0.0; rows * 5];
            fill_rows(&mut team, &mut out, 5, |row, out| {
                out.fill(row as f32 + 1.0)
            });
            let expected: Vec<f32> = (0..rows * 5).map(|i| (i / 5) as f32 + 1.0).collect();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn parts_are_added_in_order_and_rows_placed() {
        for threads in [1, 3] {
            let mut team = Team::new(threads, Isa::Scalar, 64, 64).unwrap();
            let len = 2 * NUMBERS + 77;
            let [mut x, a, b] = [1, 2, 3].map(|seed| random(len, seed));
            let expected: Vec<f32> = (0..len).map(|i| x[i] + a[i] + b[i]).collect();
            add(&mut team, &mut x, &[&a, &b]);
            assert_eq!(x, expected);

            let (columns, width) = (5..NUMBERS + 9, NUMBERS + 20);
            let rows = random(3 * columns.len(), 4);
            let mut out = vec![7.0; 3 * width];
            place(&mut team, &rows, columns.clone(), &mut out, width);
            for (row, out) in rows.chunks(columns.len()).zip(out.chunks(width)) {
                assert_eq!(out[columns.clone()], *row);
                assert!(
                    out[..5]
                        .iter()
                        .chain(&out[columns.end..])
                        .all(|&x| x == 7.0)
                );
            }
        }
    }
}
