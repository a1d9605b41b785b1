//! Matrix products on the shapes of SmolLM2-135M, beside the limits of the machine.
//!
//! The weights of all layers are distinct and used in turn, so that caches behave as in a
//! model. The machine may be shared: each figure is the best of many short windows.

use std::hint::black_box;
use std::time::{Duration, Instant};

use shoal_kernels::Isa;
use shoal_kernels::arena::Arena;
use shoal_kernels::gemm::{Linear, Placed, Write, multiply};
use shoal_kernels::limits::{best, dot_rate, read_rate};
use shoal_kernels::pack::{Block, BlockRows, Format, Layout, Packing, Source, pack};
use shoal_kernels::pool::Pool;
use shoal_kernels::quant::{Activations, SumOrder};
use shoal_kernels::team::Team;

const LAYERS: usize = 30;
/// How long to repeat the forward pass of a batch.
const PASSES: Duration = Duration::from_secs(3);

/// Name, output rows, columns, format, copies.
const SHAPES: [(&str, usize, usize, Format, usize); 5] = [
    ("qkv", 960, 576, Format::U4Min, LAYERS),
    ("out", 576, 576, Format::U4Min, LAYERS),
    ("gate/up", 3072, 576, Format::U4Min, LAYERS),
    ("down", 576, 1536, Format::U4Min, LAYERS),
    ("head", 49152, 576, Format::U8Zero(128), 1),
];

/// Quants of up to so many.
struct Noise(u8);

impl BlockRows for Noise {
    fn blocks(&self, row: usize, out: &mut [Block]) {
        for (i, block) in out.iter_mut().enumerate() {
            let seed = (row * 31 + i * 17) as u8;
            *block = Block {
                quants: std::array::from_fn(|j| seed.wrapping_mul(j as u8 | 1) & self.0),
                scales: [0.01; 2],
                min: -0.08,
            };
        }
    }
}

fn main() {
    let layouts = SHAPES
        .map(|(_, n, k, format, _)| Layout::new(n, k, format).expect("the shapes are whole tiles"));
    let total = SHAPES
        .iter()
        .zip(&layouts)
        .map(|(s, l)| s.4 * l.bytes())
        .sum();
    let mut arena = Arena::new(total).expect("there is memory for the weights");
    let isa = Isa::detect();
    let mut team = Team::new(2, isa, 0, 0).expect("a thread can be started");

    let mut rest = arena.as_mut_slice();
    let mut packings = Vec::new();
    for (&(_, _, _, format, copies), layout) in SHAPES.iter().zip(&layouts) {
        let noise = if format == Format::U4Min {
            &Noise(15)
        } else {
            &Noise(255)
        };
        for _ in 0..copies {
            let (out, tail) = rest.split_at_mut(layout.bytes());
            packings.push(Packing {
                layout: *layout,
                source: Source::Blocks(noise),
                out,
            });
            rest = tail;
        }
    }
    let seconds = best(3, || {
        pack(&mut team, &mut packings).expect("the scales are finite");
    });
    println!(
        "packed {:.1} MB in {:.0} ms",
        total as f64 / 1e6,
        seconds * 1e3
    );

    let mut offset = 0;
    let mut matrices = Vec::new();
    for (shape, layout) in SHAPES.iter().zip(&layouts) {
        let copies = (0..shape.4).map(|_| {
            let layout = *layout;
            let placed = Placed { layout, offset };
            offset += layout.bytes();
            placed
        });
        matrices.push(copies.collect::<Vec<_>>());
    }

    for threads in [1, 2] {
        let mut pool = Pool::new(threads).expect("a thread can be started");
        let mut team = Team::new(threads, isa, 0, 0).expect("a thread can be started");
        let read = read_rate(&mut pool, &arena.as_slice()[..total]);
        let vnni = dot_rate(&mut pool, isa).unwrap_or(f64::NAN);
        println!(
            "\n{isa:?}, {threads} threads: memory {:.1} GB/s, VNNI {:.2} TOPS",
            read / 1e9,
            vnni / 1e12
        );
        println!("shape     rows      us/call    GB/s     %    TOPS     %");
        let decodes = [1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 512];
        let prompts = [16, 32, 64, 128, 512];
        let decodes = decodes.map(|rows| (rows, "int8"));
        for (rows, kind) in decodes
            .into_iter()
            .chain(prompts.map(|rows| (rows, "bf16")))
        {
            let prompts = kind == "bf16";
            let seconds = step(&mut team, arena.as_slice(), isa, &matrices, rows, prompts);
            let mut all = [0.0; 3];
            for (i, (name, n, k, _, copies)) in SHAPES.iter().enumerate() {
                let bytes = (copies * layouts[i].bytes()) as f64;
                let ops = (2 * copies * n * k * rows) as f64;
                let sums = [seconds[i], bytes, ops];
                all = std::array::from_fn(|i| all[i] + sums[i]);
                report(name, rows, *copies, sums, read, vnni);
            }
            report(kind, rows, 1, all, read, vnni);
        }
    }
}

/// The seconds of each shape in a forward pass: for every call the least of many passes.
fn step(
    team: &mut Team,
    data: &[u8],
    isa: Isa,
    matrices: &[Vec<Placed>],
    rows: usize,
    prompts: bool,
) -> [f64; SHAPES.len()] {
    let mut acts: Vec<Activations> = Vec::new();
    for (_, _, k, format, _) in SHAPES {
        let x: Vec<f32> = (0..k).map(|i| (i % 13) as f32 - 6.0).collect();
        let mut rows_of = Activations::new(rows, k, [format.precision()]);
        if prompts {
            rows_of = rows_of.with_prompts(SumOrder::Pairs);
            rows_of.set_prompts(0);
        }
        (0..rows).for_each(|row| rows_of.write(isa, row, 0, &x));
        acts.push(rows_of);
    }
    let most = SHAPES.iter().map(|s| s.1).max().unwrap_or(0);
    let mut out = vec![0.0; rows * most];
    let mut least: Vec<Vec<f64>> = matrices
        .iter()
        .map(|m| vec![f64::INFINITY; m.len()])
        .collect();
    let started = Instant::now();
    while started.elapsed() < PASSES {
        for layer in 0..LAYERS {
            for (shape, matrices) in matrices.iter().enumerate() {
                let Some(matrix) = matrices.get(layer) else {
                    continue;
                };
                let start = Instant::now();
                let linear = Linear::new(data, std::slice::from_ref(matrix));
                multiply(team, linear, &acts[shape], rows, &mut out, Write::Set);
                let seconds = start.elapsed().as_secs_f64();
                black_box(&out);
                least[shape][layer] = least[shape][layer].min(seconds);
            }
        }
    }
    std::array::from_fn(|shape| least[shape].iter().sum())
}

fn report(name: &str, rows: usize, calls: usize, sums: [f64; 3], read: f64, vnni: f64) {
    let [seconds, bytes, ops] = sums;
    println!(
        "{name:<8} {rows:>5} {:>12.1} {:>7.1} {:>5.0} {:>7.3} {:>5.0}",
        seconds / calls as f64 * 1e6,
        bytes / seconds / 1e9,
        100.0 * bytes / seconds / read,
        ops / seconds / 1e12,
        100.0 * ops / seconds / vnni,
    );
}
