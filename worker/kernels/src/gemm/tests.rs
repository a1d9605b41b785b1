mod packing;
mod prompt;

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::pack::{Block, BlockRows, FloatRows, NotFinite, Packing, Source, TILE, pack};
use crate::quant::{Precision, SumOrder};
use crate::testing::{isas, random};

const QUANTS: [Format; 7] = [
    Format::U4Zero,
    Format::U4Min,
    Format::U8Zero(128),
    Format::U8Zero(16),
    Format::U8Min,
    Format::U8Halves(128),
    Format::U8Halves(32),
];
const FLOATS: [Format; 3] = [Format::F32, Format::F16, Format::Bf16];

fn zero(format: Format) -> f32 {
    match format {
        Format::U4Zero => 8.0,
        Format::U8Zero(zero) | Format::U8Halves(zero) => zero.into(),
        _ => 0.0,
    }
}

/// Blocks by row.
#[derive(Clone)]
struct Quants(Vec<Vec<Block>>);

impl BlockRows for Quants {
    fn blocks(&self, row: usize, out: &mut [Block]) {
        out.copy_from_slice(&self.0[row]);
    }
}

/// Floats by row.
struct Floats<'a>(&'a [f32]);

impl FloatRows for Floats<'_> {
    fn floats(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[row * out.len()..][..out.len()]);
    }
}

fn team(threads: usize) -> Team {
    Team::new(threads, Isa::detect(), 0, 0).unwrap()
}

/// Packs a matrix on every instruction set: the same bytes.
fn packed(layout: Layout, source: Source<'_>, threads: usize) -> Result<Vec<u8>, NotFinite> {
    let mut all = isas().into_iter().map(|isa| {
        let mut out = vec![0xaa; layout.bytes()];
        let packing = Packing {
            layout,
            source,
            out: &mut out,
        };
        let mut team = Team::new(threads, isa, 0, 0).unwrap();
        pack(&mut team, &mut [packing]).map(|()| out)
    });
    let first = all.next().unwrap();
    assert!(all.all(|other| other == first), "instruction sets differ");
    first
}

impl Quants {
    /// Quants from zero to the greatest that `format` has, and scales of both signs up to `size`.
    fn random(format: Format, n: usize, k: usize, seed: u64, size: f32) -> Self {
        let top = match format {
            Format::U4Zero | Format::U4Min => 15.0,
            Format::U8Zero(z) | Format::U8Halves(z) => f32::from(z) + 127.0,
            _ => 255.0f32,
        };
        let x = random(n * k * 2, seed);
        let blocks = x.chunks_exact(2 * TILE).map(|x| {
            let half = |v: f32| f16::from_f32(v * size).to_f32();
            let halves = matches!(format, Format::U8Halves(_));
            Block {
                quants: std::array::from_fn(|j| ((x[j] + 1.0) / 2.0 * top).round() as u8),
                scales: [half(x[40]), half(if halves { x[41] } else { x[40] })],
                min: if matches!(format, Format::U4Min | Format::U8Min) {
                    half(x[42])
                } else {
                    0.0
                },
            }
        });
        let blocks: Vec<Block> = blocks.collect();
        Self(
            blocks
                .chunks_exact(k / TILE)
                .map(<[Block]>::to_vec)
                .collect(),
        )
    }

    /// The weights that they stand for, as scaled quants and minima.
    fn exact(&self, format: Format) -> Vec<[f64; 2]> {
        let blocks = self.0.iter().flatten();
        let weights = blocks.flat_map(|b| {
            std::array::from_fn::<_, TILE, _>(|j| {
                let quant = f64::from(b.quants[j]) - f64::from(zero(format));
                [quant * f64::from(b.scales[j / 16]), b.min.into()]
            })
        });
        weights.collect()
    }
}

/// A packed matrix and what its weights are: the scaled quant or the float, and the minimum.
struct Packed {
    layout: Layout,
    bytes: Vec<u8>,
    exact: Vec<[f64; 2]>,
}

impl Packed {
    fn quants(format: Format, source: &Quants, threads: usize) -> Self {
        let (n, k) = (source.0.len(), source.0[0].len() * TILE);
        let layout = Layout::new(n, k, format).unwrap();
        let bytes = packed(layout, Source::Blocks(source), threads).unwrap();
        let exact = source.exact(format);
        Self {
            layout,
            bytes,
            exact,
        }
    }

    fn floats(format: Format, weights: &[f32], k: usize) -> Self {
        let layout = Layout::new(weights.len() / k, k, format).unwrap();
        let bytes = packed(layout, Source::Floats(&Floats(weights)), 2).unwrap();
        let mut packed = Self {
            layout,
            bytes,
            exact: Vec::new(),
        };
        packed.exact = packed.weights().iter().map(|&w| [w.into(), 0.0]).collect();
        packed
    }

    fn matrix(&self) -> Matrix<'_> {
        (self.layout, &self.bytes)
    }

    fn weights(&self) -> Vec<f32> {
        let mut weights = vec![0.0; self.layout.n() * self.layout.k()];
        for (row, out) in weights.chunks_exact_mut(self.layout.k()).enumerate() {
            self.layout.unpack_row(&self.bytes, row, out);
        }
        weights
    }
}

/// `x` as the matrices take it.
fn activations(isa: Isa, x: &[f32], matrices: &[Matrix<'_>]) -> Activations {
    activations_with(isa, x, matrices, (usize::MAX, SumOrder::Pairs))
}

/// The same, the rows from `prompts` on being those of prompts, which are summed in that order.
fn activations_with(
    isa: Isa,
    x: &[f32],
    matrices: &[Matrix<'_>],
    (prompts, order): (usize, SumOrder),
) -> Activations {
    let k = matrices[0].0.k();
    let precisions = matrices.iter().map(|m| m.0.format().precision());
    let mut acts = Activations::new(x.len() / k, k, precisions).with_prompts(order);
    acts.set_prompts(prompts);
    for (row, x) in x.chunks_exact(k).enumerate() {
        acts.write(isa, row, 0, x);
    }
    acts
}

type Matrix<'a> = (Layout, &'a [u8]);

/// Matrices in one piece of memory.
fn stacked(matrices: &[Matrix<'_>]) -> (Vec<u8>, Vec<Placed>) {
    let mut data = Vec::new();
    let mut parts = Vec::new();
    for &(layout, bytes) in matrices {
        data.resize(data.len() + 64, 0xaa);
        let offset = data.len();
        parts.push(Placed { layout, offset });
        data.extend_from_slice(bytes);
    }
    (data, parts)
}

/// The product for every instruction set: one result, bit for bit.
fn product(matrices: &[Matrix<'_>], x: &[f32], threads: usize) -> Vec<f32> {
    product_with(matrices, x, threads, (usize::MAX, SumOrder::Pairs))
}

/// The same, the rows from `prompts` on being those of prompts, which are summed in that order.
fn product_with(
    matrices: &[Matrix<'_>],
    x: &[f32],
    threads: usize,
    prompts: (usize, SumOrder),
) -> Vec<f32> {
    let (data, parts) = stacked(matrices);
    let linear = Linear::new(&data, &parts);
    let rows = x.len() / matrices[0].0.k();
    let mut products = isas().into_iter().map(|isa| {
        let mut team = Team::new(threads, isa, 0, 0).unwrap();
        let acts = activations_with(isa, x, matrices, prompts);
        let mut out = vec![f32::NAN; rows * linear.n()];
        multiply(&mut team, linear, &acts, rows, &mut out, Write::Set);
        out
    });
    let first = products.next().unwrap();
    for other in products {
        assert_eq!(bits(&other), bits(&first), "instruction sets differ");
    }
    first
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Checks `out` against the sums of exact products of the weights and the activations as they
/// are kept, to within the roundings that the definition allows.
fn check(packed: &Packed, x: &[f32], out: &[f32]) {
    let (n, k) = (packed.layout.n(), packed.layout.k());
    let acts = activations(Isa::Scalar, x, &[packed.matrix()]);
    let roundings = 4.0 + 4.0 * (k / packed.layout.format().tile_columns()) as f64;
    for (row, out) in out.chunks_exact(n).enumerate() {
        // SAFETY: in bounds, and nothing writes.
        let act = |i: usize| unsafe {
            match packed.layout.format().precision() {
                Precision::F32 => f64::from(*acts.float(row, i)),
                Precision::Int8 => {
                    let block = &*acts.block(row, i / TILE);
                    f64::from(block.scale) * f64::from(block.values[i % TILE])
                }
            }
        };
        for (column, &out) in out.iter().enumerate() {
            let (mut exact, mut size) = (0.0, 0.0);
            for (i, part) in packed.exact[column * k..][..k].iter().enumerate() {
                exact += (part[0] + part[1]) * act(i);
                size += (part[0].abs() + part[1].abs()) * act(i).abs();
            }
            let bound = roundings * f64::from(f32::EPSILON) * size + f64::from(f32::MIN_POSITIVE);
            let error = (f64::from(out) - exact).abs();
            assert!(
                error <= bound,
                "{:?}: {out} is not {exact}",
                packed.layout.format()
            );
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_and_split() {
    let (k, most) = (96, 70);
    let x = random(most * k, 9);
    for format in QUANTS.into_iter().chain(FLOATS) {
        let packed = match format.precision() {
            Precision::Int8 => Packed::quants(format, &Quants::random(format, 83, k, 7, 0.02), 1),
            Precision::F32 => Packed::floats(format, &random(83 * k, 7), k),
        };
        let whole = product(&[packed.matrix()], &x, 1);
        check(&packed, &x, &whole);
        for rows in 1..=most {
            let start = most - rows;
            let part = product(&[packed.matrix()], &x[start * k..], 1 + rows % 3);
            assert_eq!(bits(&part), bits(&whole[start * 83..]), "{format:?} {rows}");
        }
    }
}

#[test]
fn batches_beyond_a_row_block_agree() {
    let (k, rows) = (32, ROW_BLOCK + 13);
    let source = Quants::random(Format::U4Min, 16, k, 1, 0.1);
    let packed = Packed::quants(Format::U4Min, &source, 1);
    let x = random(rows * k, 2);
    let whole = product(&[packed.matrix()], &x, 2);
    for (row, x) in x.chunks_exact(k).enumerate() {
        let alone = product(&[packed.matrix()], x, 1);
        assert_eq!(bits(&alone), bits(&whole[row * 16..][..16]));
    }
}

#[test]
fn matrices_side_by_side_are_the_matrices() {
    let k = 64;
    let floats = Packed::floats(Format::F16, &random(21 * k, 4), k);
    let [first, last] = [(Format::U4Min, 5), (Format::U8Halves(32), 37)]
        .map(|(format, n)| Packed::quants(format, &Quants::random(format, n, k, n as u64, 0.1), 1));
    let packed = [first, floats, last];
    let matrices: Vec<Matrix<'_>> = packed.iter().map(Packed::matrix).collect();
    let x = random(11 * k, 5);
    let together = product(&matrices, &x, 3);
    let alone: Vec<Vec<f32>> = matrices.iter().map(|&m| product(&[m], &x, 1)).collect();
    for (row, together) in together.chunks_exact(5 + 21 + 37).enumerate() {
        let parts: Vec<f32> = alone
            .iter()
            .flat_map(|out| out.chunks_exact(out.len() / 11).nth(row).unwrap().to_vec())
            .collect();
        assert_eq!(bits(together), bits(&parts));
    }
}

#[test]
fn adding_adds_the_product_last() {
    let k = 64;
    let source = Quants::random(Format::U8Zero(128), 21, k, 1, 0.1);
    let packed = Packed::quants(Format::U8Zero(128), &source, 1);
    let (x, residual) = (random(9 * k, 2), random(9 * 21, 3));
    let set = product(&[packed.matrix()], &x, 1);
    let sum: Vec<f32> = residual.iter().zip(&set).map(|(r, s)| r + s).collect();
    let (data, parts) = stacked(&[packed.matrix()]);
    let linear = Linear::new(&data, &parts);
    for isa in isas() {
        let mut team = Team::new(2, isa, 0, 0).unwrap();
        let acts = activations(isa, &x, &[packed.matrix()]);
        let mut out = residual.clone();
        multiply(&mut team, linear, &acts, 9, &mut out, Write::Add);
        assert_eq!(bits(&out), bits(&sum));
    }
}

/// The gated projection is the product, then `silu(gate) * up`, then the activations of it.
#[test]
fn gates_are_fused_without_a_change() {
    let (k, width, rows) = (64, 96, ROW_BLOCK + 9);
    let x = random(rows * k, 4);
    for format in [Format::U4Min, Format::F16] {
        let packed = |seed| match format.precision() {
            Precision::Int8 => {
                Packed::quants(format, &Quants::random(format, width, k, seed, 0.1), 1)
            }
            Precision::F32 => Packed::floats(format, &random(width * k, seed), k),
        };
        let (gates, ups) = (packed(1), packed(2));
        let matrices = [gates.matrix(), ups.matrix()];
        let separate = product(&matrices, &x, 2);
        let (data, parts) = stacked(&matrices);
        for isa in isas() {
            for threads in [1, 2, 3] {
                let mut team = Team::new(threads, isa, 0, 0).unwrap();
                let acts = activations(isa, &x, &matrices);
                let mut out = Activations::new(rows, width, [format.precision()]);
                gated(&mut team, Linear::new(&data, &parts), &acts, rows, &mut out);
                for (row, both) in separate.chunks_exact(2 * width).enumerate() {
                    for i in 0..width {
                        let (gate, up) = (f64::from(both[i]), f64::from(both[width + i]));
                        let exact = gate / (1.0 + (-gate).exp()) * up;
                        // SAFETY: in bounds, and nothing writes.
                        let (value, step) = unsafe {
                            match format.precision() {
                                Precision::F32 => (*out.float(row, i), 0.0),
                                Precision::Int8 => {
                                    let block = &*out.block(row, i / TILE);
                                    (block.scale * f32::from(block.values[i % TILE]), block.scale)
                                }
                            }
                        };
                        let bound = 0.501 * f64::from(step) + 1e-5 * exact.abs() + 1e-9;
                        assert!(
                            (f64::from(value) - exact).abs() <= bound,
                            "{isa:?} {row} {i}"
                        );
                    }
                }
            }
        }
    }
}

/// Weights at the ends of their range against activations at the ends of theirs: whatever an
/// instruction set could saturate or overflow.
#[test]
fn extremes_are_exact() {
    let k = 256;
    for format in QUANTS {
        let top = match format {
            Format::U4Zero | Format::U4Min => 15,
            Format::U8Zero(z) | Format::U8Halves(z) => z + 127,
            _ => 255,
        };
        for (quant, x) in [(top, 127.0), (top, -127.0), (0, 127.0), (0, -127.0f32)] {
            let block = Block {
                quants: [quant; TILE],
                scales: [1.0; 2],
                min: 0.0,
            };
            let packed = Packed::quants(format, &Quants(vec![vec![block; k / TILE]; 16]), 1);
            let out = product(&[packed.matrix()], &vec![x; 9 * k], 1);
            let expected = (f32::from(quant) - zero(format)) * x * k as f32;
            assert_eq!(out, vec![expected; 9 * 16], "{format:?}");
        }
        // One weight and one activation at a time.
        for at in [0, 3, 4, 15, 16, 31, 77, 255] {
            let source = Quants::random(format, 16, k, 5, 1.0);
            let packed = Packed::quants(format, &source, 1);
            let mut x = vec![0.0; k];
            x[at] = 127.0;
            let out = product(&[packed.matrix()], &x, 1);
            check(&packed, &x, &out);
        }
    }
}

#[test]
fn zeros_and_tiny_scales_stay_finite() {
    let k = 64;
    for format in QUANTS {
        for size in [0.0, 6e-8, 1e-6] {
            let packed = Packed::quants(format, &Quants::random(format, 16, k, 5, size), 1);
            for scale in [0.0, 1e-44, 1e-37, 1e-30, 1e30] {
                let x: Vec<f32> = random(3 * k, 8).iter().map(|x| x * scale).collect();
                let out = product(&[packed.matrix()], &x, 1);
                assert!(out.iter().all(|x| x.is_finite()));
                check(&packed, &x, &out);
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    let k = 64;
    let packed = Packed::quants(
        Format::U4Min,
        &Quants::random(Format::U4Min, 16, k, 5, 1.0),
        1,
    );
    let good = random(8 * k, 8);
    let mut bad = good.clone();
    bad[3 * k + 40] = f32::NAN;
    let (expected, out) = (
        product(&[packed.matrix()], &good, 1),
        product(&[packed.matrix()], &bad, 1),
    );
    for row in 0..8 {
        let span = row * 16..(row + 1) * 16;
        if row == 3 {
            assert!(out[span].iter().all(|x| x.is_nan()));
        } else {
            assert_eq!(out[span.clone()], expected[span]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_follow_the_definition(
        format in prop::sample::select(QUANTS.to_vec()),
        n in 1usize..70,
        tiles in 1usize..8,
        rows in 1usize..20,
        threads in 1usize..4,
        size in prop::sample::select(vec![1e-4f32, 0.02, 1.0, 100.0]),
        seed: u64,
    ) {
        let k = tiles * TILE;
        let packed = Packed::quants(format, &Quants::random(format, n, k, seed, size), threads);
        let x = random(rows * k, seed ^ 1);
        check(&packed, &x, &product(&[packed.matrix()], &x, threads));
    }
}

#[test]
#[should_panic = "is_multiple_of(STRIP)"]
fn an_item_that_begins_within_a_strip_is_refused() {
    let layouts = [8, 56].map(|n| Layout::new(n, 32, Format::U4Min).unwrap());
    let matrices = layouts.map(|layout| (layout, vec![0; layout.bytes()]));
    let matrices: Vec<Matrix<'_>> = matrices.iter().map(|(l, b)| (*l, &b[..])).collect();
    let (data, parts) = stacked(&matrices);
    let acts = activations(Isa::Scalar, &[0.0; 32], &matrices);
    let mut out = Activations::new(1, 32, [Precision::Int8]);
    let mut team = Team::new(1, Isa::Scalar, 0, 0).unwrap();
    gated(&mut team, Linear::new(&data, &parts), &acts, 1, &mut out);
}
