use super::*;
use crate::Isa;
use crate::bf16::bf16;
use crate::gemm::Write;
use crate::testing::{isas, random};

/// Inputs of a product, with what was in the outputs before.
struct Case {
    rows: usize,
    n: usize,
    blocks: usize,
    acts: Vec<u32>,
    weights: Vec<u32>,
    before: Vec<f32>,
}

/// Numbers between rows of outputs: more than there are outputs.
const STRIDE: usize = 2 * SIDE + 3;

/// Pairs of any sign and digits, of magnitudes that differ by up to 2¹⁶.
fn pairs(words: usize, seed: u64) -> Vec<u32> {
    let x = random(2 * words, seed);
    let scale = |i: usize| 2f32.powi((i * 37 % 17) as i32 - 8);
    let half = |i: usize| bf16(x[i] * scale(i));
    (0..words)
        .map(|i| half(2 * i) | half(2 * i + 1) << 16)
        .collect()
}

impl Case {
    fn new(rows: usize, n: usize, blocks: usize) -> Self {
        let seed = (rows * 1000 + n * 10 + blocks) as u64;
        Self {
            rows,
            n,
            blocks,
            acts: pairs(rows.div_ceil(SIDE) * blocks * TILE, seed),
            weights: pairs(n.div_ceil(SIDE) * blocks * TILE, seed + 1),
            before: random(rows * STRIDE, seed + 2),
        }
    }

    /// The bits of all that the outputs lie in, after `multiply`.
    fn run(&self, write: Write, multiply: impl Fn(&Product<'_>)) -> Vec<u32> {
        let mut out = self.before.clone();
        let panels: Vec<*const u32> = self
            .weights
            .chunks_exact(self.blocks * TILE)
            .map(<[u32]>::as_ptr)
            .collect();
        multiply(&Product {
            panels: &panels,
            n: self.n,
            blocks: self.blocks,
            acts: self.acts.as_ptr(),
            rows: self.rows,
            out: Outputs {
                start: out.as_mut_ptr(),
                stride: STRIDE,
                write,
            },
        });
        out.iter().map(|x| x.to_bits()).collect()
    }

    fn in_software(&self, isa: Isa, write: Write) -> Vec<u32> {
        // SAFETY: the case has all that a product reads, and room for what it writes.
        self.run(write, |product| unsafe { order::multiply(isa, product) })
    }

    /// The pairs of a row, and those of its weights for an output.
    fn pairs(&self, row: usize, output: usize) -> impl Iterator<Item = (u32, u32)> {
        let tile = |group: usize, i: usize| (group * self.blocks + i / SIDE) * TILE;
        (0..self.blocks * SIDE).map(move |i| {
            let act = tile(row / SIDE, i) + row % SIDE * SIDE + i % SIDE;
            let weight = tile(output / SIDE, i) + i % SIDE * SIDE + output % SIDE;
            (self.acts[act], self.weights[weight])
        })
    }

    /// What `sum(row, output)` makes of the outputs.
    fn expected(&self, write: Write, sum: impl Fn(usize, usize) -> f32) -> Vec<u32> {
        let mut out = self.before.clone();
        for row in 0..self.rows {
            for output in 0..self.n {
                let to = &mut out[row * STRIDE + output];
                *to = match write {
                    Write::Set => sum(row, output),
                    Write::Add => *to + sum(row, output),
                };
            }
        }
        out.iter().map(|x| x.to_bits()).collect()
    }
}

fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}

/// TDPBF16PS as the SDM writes it, block after block, for one output.
fn by_the_book(pairs: impl Iterator<Item = (u32, u32)>) -> f32 {
    let mut acc = 0.0;
    let (mut even, mut odd) = (0f32, 0f32);
    for (i, (a, b)) in pairs.enumerate() {
        even = low(a).mul_add(low(b), even);
        odd = high(a).mul_add(high(b), odd);
        if i % SIDE == SIDE - 1 {
            acc += even + odd;
            (even, odd) = (0.0, 0.0);
        }
    }
    acc
}

#[test]
fn software_sums_in_tile_order_on_every_instruction_set() {
    for (rows, n, blocks) in [
        (1, 16, 1),
        (2, 32, 2),
        (7, 9, 3),
        (15, 17, 1),
        (16, 32, 18),
        (37, 31, 4),
    ] {
        let case = Case::new(rows, n, blocks);
        for write in [Write::Set, Write::Add] {
            let expected = case.expected(write, |row, output| by_the_book(case.pairs(row, output)));
            for isa in isas() {
                assert_eq!(case.in_software(isa, write), expected, "{isa:?} {rows} {n}");
            }
        }
    }
}

#[test]
fn the_sum_is_near_the_exact_one() {
    for blocks in [1, 18, 48] {
        let case = Case::new(5, 32, blocks);
        let got = case.in_software(Isa::detect(), Write::Set);
        for row in 0..case.rows {
            for output in 0..case.n {
                let (mut exact, mut size) = (0.0, 0.0);
                for (a, b) in case.pairs(row, output) {
                    for part in [low, high] {
                        let product = f64::from(part(a)) * f64::from(part(b));
                        exact += product;
                        size += product.abs();
                    }
                }
                // A term is rounded at most 16 times in its chain, once with the other chain
                // and once for every block.
                let bound = (17 + blocks) as f64 * f64::from(f32::EPSILON) / 2.0 * size;
                let got = f64::from(f32::from_bits(got[row * STRIDE + output]));
                assert!((got - exact).abs() <= bound * 1.001, "{row} {output}");
            }
        }
    }
}

#[test]
fn the_order_is_another_than_that_of_one_chain() {
    let case = Case::new(16, 16, 1);
    let one_chain = case.expected(Write::Set, |row, output| {
        case.pairs(row, output).fold(0f32, |sum, (a, b)| {
            high(a).mul_add(high(b), low(a).mul_add(low(b), sum))
        })
    });
    assert_ne!(case.in_software(Isa::Scalar, Write::Set), one_chain);
}

#[test]
fn the_unit_is_asked_once() {
    assert_eq!(state(), state());
    assert_eq!(available(), state().is_ok());
    println!("tile unit: {:?}", state());
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod on_tiles {
    use super::*;

    fn check(rows: usize, n: usize, blocks: usize) {
        let case = Case::new(rows, n, blocks);
        for write in [Write::Set, Write::Add] {
            // SAFETY: the caller found the unit; the case has all that a product takes.
            let got = case.run(write, |product| unsafe { unit::multiply(product) });
            let expected = case.in_software(Isa::detect(), write);
            assert_eq!(
                got, expected,
                "{rows} rows, {n} outputs, {blocks} blocks, {write:?}"
            );
        }
    }

    /// Runs nowhere but on a machine with the unit, and says so.
    fn there() -> bool {
        if let Err(lack) = state() {
            println!("no tile unit: {lack:?}");
        }
        available()
    }

    #[test]
    fn every_count_of_rows_has_the_bits_of_software() {
        for rows in (1..=70).take_while(|_| there()) {
            for n in [16, 32] {
                for blocks in [1, 2, 5] {
                    check(rows, n, blocks);
                }
            }
        }
    }

    #[test]
    fn every_width_has_the_bits_of_software() {
        for n in (1..=32).take_while(|_| there()) {
            for rows in [1, 16, 23, 32, 48, 50] {
                check(rows, n, 3);
            }
        }
    }

    #[test]
    fn every_depth_has_the_bits_of_software() {
        for blocks in (1..=48).take_while(|_| there()) {
            for (rows, n) in [(5, 16), (16, 32), (20, 16), (70, 32)] {
                check(rows, n, blocks);
            }
        }
    }
}
