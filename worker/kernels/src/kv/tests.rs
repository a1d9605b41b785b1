use super::*;
use crate::Isa;
use crate::attention::MAX_QUERIES;
use crate::gemm::{Placed, multiply};
use crate::pack::{FloatRows, Format, Layout, Packing, Source, pack};
use crate::quant::Precision;
use crate::testing::{isas, random};

const WIDTH: usize = 32;

/// Rows of f32 weights, so that the projection is exact to compare.
struct Floats(Vec<f32>);

impl FloatRows for Floats {
    fn floats(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[row * WIDTH..][..WIDTH]);
    }
}

/// Sequences that grow in steps on a pool of their own.
struct Rig {
    heads: Heads,
    team: Team,
    kv: KvPool,
    plan: Plan,
    weights: Vec<u8>,
    part: Placed,
}

impl Rig {
    fn new(kv: KvType, heads: Heads, threads: usize, isa: Isa) -> Self {
        let mut team = Team::new(threads, isa, WIDTH, heads.dim).unwrap();
        let layout = Layout::new(heads.qkv(), WIDTH, Format::F32).unwrap();
        let mut weights = vec![0; layout.bytes()];
        let source = Floats(random(heads.qkv() * WIDTH, 1));
        let packing = Packing {
            layout,
            source: Source::Floats(&source),
            out: &mut weights,
        };
        pack(&mut team, &mut [packing]).unwrap();
        Self {
            heads,
            kv: KvPool::new(kv, heads, 2, 64).unwrap(),
            plan: Plan::new(heads, threads, 512),
            weights,
            part: Placed { layout, offset: 0 },
            team,
        }
    }

    /// Runs the second layer on rows of sequences, each `(position, inputs, pages)`; what the
    /// heads attend to, row by row. Each head's number is added as a bias.
    fn step(&mut self, sequences: &[(usize, &[f32], &[u32])]) -> Vec<f32> {
        let inputs: Vec<f32> = sequences.iter().flat_map(|s| s.1).copied().collect();
        let (rows, isa) = (inputs.len() / WIDTH, self.team.isa);
        let mut acts = Activations::new(rows, WIDTH, [Precision::F32]);
        for (row, x) in inputs.chunks_exact(WIDTH).enumerate() {
            acts.write(isa, row, 0, x);
        }
        self.plan
            .set(sequences.iter().map(|&(position, x, pages)| Run {
                rows: x.len() / WIDTH,
                position,
                pages,
            }));
        let parts = [self.part];
        let linear = Linear::new(&self.weights, &parts);
        let width = self.heads.q * self.heads.dim;
        let mut queries = vec![u32::MAX; rows * self.heads.query_words()];
        let (team, plan) = (&mut self.team, &mut self.plan);
        self.kv.project(
            team,
            1,
            plan,
            (linear, &acts),
            &mut queries,
            &|_, head, x| {
                x.iter_mut().for_each(|x| *x += head as f32 / 16.0);
            },
        );
        let mut out = Activations::new(rows, width, [Precision::F32]);
        self.kv.attend(team, 1, plan, &queries, &mut out);
        (0..rows * width)
            // SAFETY: in bounds, and nothing writes.
            .map(|i| unsafe { *out.float(i / width, i % width) })
            .collect()
    }
}

/// As many queries as a call takes, and groups that fill no blocks, among them.
fn heads() -> [Heads; 7] {
    let all = Heads::new(9, 3, 64);
    [
        all,
        all.part(0..5),
        all.part(5..9),
        all.part(4..5),
        Heads::new(2, 2, 48),
        Heads::new(4, 1, 16),
        Heads::new(62, 2, 16),
    ]
}

#[test]
fn attends_to_what_was_projected() {
    for heads in heads() {
        let Heads { q, kv, dim, .. } = heads;
        let tokens = 70;
        let x = random(tokens * WIDTH, 5);
        let mut rig = Rig::new(KvType::Bf16, heads, 2, Isa::detect());
        let out = rig.step(&[(0, &x, &[7, 3, 5])]);

        let mut acts = Activations::new(tokens, WIDTH, [Precision::F32]);
        for (row, x) in x.chunks_exact(WIDTH).enumerate() {
            acts.write(Isa::Scalar, row, 0, x);
        }
        let mut qkv = vec![0.0; tokens * heads.qkv()];
        let parts = [rig.part];
        let linear = Linear::new(&rig.weights, &parts);
        multiply(&mut rig.team, linear, &acts, tokens, &mut qkv, Write::Set);
        let number = |t: usize, head: usize, d: usize| {
            f64::from(qkv[t * heads.qkv() + head * dim + d] + head as f32 / 16.0)
        };
        let stored = |t, head, d| half::bf16::from_f64(number(t, head, d)).to_f64();
        let scale = f64::from(crate::attention::query_scale(dim));
        let asked = |t, head, d| half::bf16::from_f64(number(t, head, d) * scale).to_f64();
        for (t, out) in out.chunks_exact(q * dim).enumerate() {
            for head in 0..q {
                let pair = q + (head + heads.lacks) / heads.group;
                let score = |s| -> f64 {
                    (0..dim)
                        .map(|d| asked(t, head, d) * stored(s, pair, d))
                        .sum()
                };
                let scores: Vec<f64> = (0..=t).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp2()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let value = |s: usize| weights[s] * stored(s, pair + kv, d);
                    let exact = (0..=t).map(value).sum::<f64>() / total;
                    let error = (f64::from(out[head * dim + d]) - exact).abs();
                    assert!(error < 2e-2, "{heads:?} {t} {head} {d}: {error}");
                }
            }
        }
    }
}

#[test]
fn batch_split_pages_and_instruction_set_change_no_bit() {
    for (kv, heads) in KvType::ALL
        .into_iter()
        .flat_map(|kv| heads().map(|h| (kv, h)))
    {
        let tokens = 500;
        let x = random(tokens * WIDTH, 6);
        let row = heads.q * heads.dim;
        let pages: Vec<u32> = (0..16).collect();
        let whole = Rig::new(kv, heads, 1, Isa::detect()).step(&[(0, &x, &pages)]);
        for isa in isas() {
            for threads in [1, 2, 5] {
                let mut rig = Rig::new(kv, heads, threads, isa);
                // Beside another sequence in chunks, then token by token.
                let (other, pages) = (random(3 * WIDTH, 9), Vec::from_iter((20..36).rev()));
                let mut position = 0;
                for chunk in [150, 7, 330].into_iter().chain([1; 13]) {
                    let new = &x[position * WIDTH..(position + chunk) * WIDTH];
                    let sequences: [(usize, &[f32], &[u32]); 2] =
                        [(0, &other, &[50]), (position, new, &pages)];
                    let out = rig.step(&sequences[usize::from(chunk == 1)..]);
                    let out = &out[out.len() - chunk * row..];
                    let expected = &whole[position * row..][..chunk * row];
                    assert!(
                        out == expected,
                        "{kv:?} {heads:?} {isa:?} {threads} {position}"
                    );
                    position += chunk;
                }
                assert_eq!(position, tokens);
                let alone = (heads.members(0..1).len() * heads.dim).is_multiple_of(32);
                let split = threads > 1 && alone;
                assert_eq!(!rig.plan.splits.is_empty(), split);
            }
        }
    }
}

#[test]
fn a_common_beginning_changes_no_bit() {
    let [all, rest @ ..] = heads();
    let of_all = KvType::ALL.map(|kv| (kv, all));
    let of_rest = rest.map(|heads| (KvType::default(), heads));
    for (kv, heads) in of_all.into_iter().chain(of_rest) {
        for (isa, threads) in isas().into_iter().flat_map(|i| [1, 2].map(|t| (i, t))) {
            let mut rig = Rig::new(kv, heads, threads, isa);
            // Nine spans and a page, which not all have.
            let common: Vec<u32> = (0..19).collect();
            for half in 0..2 {
                let tokens = random(304 * WIDTH, 6 + half);
                rig.step(&[(304 * half as usize, &tokens, &common)]);
            }
            // Histories of their own, of 1 to 56 tokens, then a row or two.
            let sequences: Vec<_> = (0..12)
                .map(|i| {
                    let pages = if i % 3 == 0 { 18 } else { 19 };
                    let own = (20 + 3 * i..23 + 3 * i).collect::<Vec<u32>>();
                    let table = [&common[..pages as usize], &own].concat();
                    let (position, old) = (32 * pages as usize, 1 + 5 * i as usize);
                    rig.step(&[(position, &random(old * WIDTH, 20 + u64::from(i)), &table)]);
                    let new = random((1 + i as usize % 2) * WIDTH, 40 + u64::from(i));
                    (position + old, new, table)
                })
                .collect();
            let step = |(position, new, table): &'_ (usize, Vec<f32>, Vec<u32>)| {
                rig.step(&[(*position, new, table)])
            };
            let alone: Vec<f32> = sequences.iter().flat_map(step).collect();
            let mut all = Vec::new();
            for (position, new, table) in &sequences {
                all.push((*position, &new[..], &table[..]));
            }
            let together = rig.step(&all);
            assert!(together == alone, "{kv:?} {heads:?} {isa:?} {threads}");
            let shared = rig.plan.items.iter().any(|item| item.blocks.len() > 1);
            let fits = 3 * 2 * heads.most() <= MAX_QUERIES;
            let one_head = (heads.members(0..1).len() * heads.dim).is_multiple_of(32);
            // Not where one item of it would be too much for a thread.
            let even = threads == 1 || heads.q == 9;
            assert!(shared || !(fits && one_head && even), "{heads:?} {threads}");
        }
    }
}
