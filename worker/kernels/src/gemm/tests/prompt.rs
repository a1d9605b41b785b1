//! Rows of prompts: brain floats.

use half::bf16;
use proptest::prelude::*;

use super::*;

const ORDERS: [SumOrder; 2] = [SumOrder::Pairs, SumOrder::Tiles];

/// A brain float, as activations are rounded.
fn rounded(x: f32) -> f64 {
    bf16::from_f32(x).to_f64()
}

/// The weights of a matrix as the product takes them.
fn weights(format: Format, source: &Quants) -> Vec<f64> {
    let steps = match format {
        Format::U4Zero | Format::U4Min => 16.0,
        _ => 256.0f32,
    };
    // Packing moves zero points of eight bits to 128.
    let zero = f32::from(format.stored_zero());
    let weights = source.0.iter().flatten().flat_map(|block| {
        std::array::from_fn::<_, TILE, _>(|j| {
            let quant = f32::from(block.quants[j].wrapping_add(format.shift()));
            let scale = block.scales[j / 16];
            let min = match format {
                Format::U4Min | Format::U8Min => block.min,
                _ => -zero * scale,
            };
            let weight = (1.0 + quant / steps).mul_add(steps * scale, min - steps * scale);
            bf16::from_f32(weight).to_f64()
        })
    });
    weights.collect()
}

/// Checks `out` against exact sums of the rounded numbers.
fn check_prompts(format: Format, source: &Quants, x: &[f32], out: &[f32]) {
    let k = source.0[0].len() * TILE;
    let weights = weights(format, source);
    let bound = 2.0 * k as f64 * f64::from(f32::EPSILON);
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact(source.0.len())) {
        for (weights, &out) in weights.chunks_exact(k).zip(out) {
            let products = || weights.iter().zip(x).map(|(w, &x)| w * rounded(x));
            let (exact, size) = (
                products().sum::<f64>(),
                products().map(f64::abs).sum::<f64>(),
            );
            let error = (f64::from(out) - exact).abs();
            assert!(
                error <= bound * size + 1e-30,
                "{format:?}: {out} is not {exact}"
            );
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_and_split() {
    let (k, n, most) = (96, 83, 70);
    let x = random(most * k, 9);
    let each = QUANTS
        .into_iter()
        .flat_map(|format| ORDERS.map(|order| (format, order)));
    for (format, order) in each {
        let source = Quants::random(format, n, k, 7, 0.02);
        let packed = Packed::quants(format, &source, 1);
        let whole = product_with(&[packed.matrix()], &x, 1, (0, order));
        check_prompts(format, &source, &x, &whole);
        for rows in (1..=most).step_by(3) {
            let start = most - rows;
            let part = product_with(
                &[packed.matrix()],
                &x[start * k..],
                1 + rows % 3,
                (0, order),
            );
            assert_eq!(bits(&part), bits(&whole[start * n..]), "{format:?} {rows}");
        }
    }
}

/// Rows of outputs come first, and are those of a batch without prompts.
#[test]
fn rows_of_outputs_and_of_prompts_share_a_batch() {
    let (k, n, rows) = (64, 53, ROW_BLOCK + 21);
    let floats = Packed::floats(Format::F16, &random(21 * k, 4), k);
    let quants = Packed::quants(
        Format::U4Min,
        &Quants::random(Format::U4Min, n - 21, k, 1, 0.1),
        1,
    );
    let matrices = [quants.matrix(), floats.matrix()];
    let x = random(rows * k, 5);
    let outputs = product(&matrices, &x, 1);
    for order in ORDERS {
        shared(&matrices, &x, &outputs, order);
    }
}

fn shared(matrices: &[Matrix<'_>], x: &[f32], outputs: &[f32], order: SumOrder) {
    let n = 53;
    let prompts = product_with(matrices, x, 1, (0, order));
    // Float weights take both as they are.
    assert_eq!(outputs[n - 21..n], prompts[n - 21..n]);
    assert_ne!(outputs[..n - 21], prompts[..n - 21]);
    for first in [1, 8, 17, ROW_BLOCK, ROW_BLOCK + 20] {
        let both = product_with(matrices, x, 2, (first, order));
        assert_eq!(bits(&both[..first * n]), bits(&outputs[..first * n]));
        assert_eq!(bits(&both[first * n..]), bits(&prompts[first * n..]));
    }
}

#[test]
fn adding_adds_the_product_last() {
    let (k, n, rows) = (64, 21, 9);
    let format = Format::U8Zero(128);
    let packed = Packed::quants(format, &Quants::random(format, n, k, 1, 0.1), 1);
    let (x, residual) = (random(rows * k, 2), random(rows * n, 3));
    let set = product_with(&[packed.matrix()], &x, 1, (0, SumOrder::Tiles));
    let sum: Vec<f32> = residual.iter().zip(&set).map(|(r, s)| r + s).collect();
    let (data, parts) = stacked(&[packed.matrix()]);
    for isa in isas() {
        let mut team = Team::new(2, isa, 0, 0).unwrap();
        let acts = activations_with(isa, &x, &[packed.matrix()], (0, SumOrder::Tiles));
        let mut out = residual.clone();
        let linear = Linear::new(&data, &parts);
        multiply(&mut team, linear, &acts, rows, &mut out, Write::Add);
        assert_eq!(bits(&out), bits(&sum));
    }
}

/// Greatest and least scales and activations: nothing is subnormal on one instruction set and
/// zero on another.
#[test]
fn extremes_have_the_same_bits() {
    let k = 64;
    for format in QUANTS {
        for size in [0.0, 6e-8, 1e-6, 200.0] {
            let source = Quants::random(format, 16, k, 5, size);
            let packed = Packed::quants(format, &source, 1);
            for scale in [0.0, 1e-44, 1e-37, 1e-16, 1e-13, 1e30] {
                let x: Vec<f32> = random(9 * k, 8).iter().map(|x| x * scale).collect();
                let out = product_with(&[packed.matrix()], &x, 1, (0, SumOrder::Pairs));
                let tiles = product_with(&[packed.matrix()], &x, 1, (0, SumOrder::Tiles));
                assert!(tiles.iter().all(|x| x.is_finite()));
                assert!(out.iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    let (k, format) = (64, Format::U4Min);
    let packed = Packed::quants(format, &Quants::random(format, 16, k, 5, 1.0), 1);
    let good = random(8 * k, 8);
    let expected = product_with(&[packed.matrix()], &good, 1, (0, SumOrder::Pairs));
    for value in [f32::NAN, f32::INFINITY] {
        let mut bad = good.clone();
        bad[3 * k + 40] = value;
        let out = product_with(&[packed.matrix()], &bad, 1, (0, SumOrder::Pairs));
        for row in 0..8 {
            let span = row * 16..(row + 1) * 16;
            match row {
                3 => assert!(out[span].iter().all(|x| !x.is_finite())),
                _ => assert_eq!(out[span.clone()], expected[span]),
            }
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
        order in prop::sample::select(ORDERS.to_vec()),
        seed: u64,
    ) {
        let k = tiles * TILE;
        let source = Quants::random(format, n, k, seed, size);
        let packed = Packed::quants(format, &source, threads);
        let x = random(rows * k, seed ^ 1);
        let out = product_with(&[packed.matrix()], &x, threads, (0, order));
        check_prompts(format, &source, &x, &out);
    }
}
