use super::*;
use crate::testing::{isas, random};

/// Pages of the second of two heads, in reverse order.
struct Stored {
    layer: Vec<u32>,
    table: Vec<u32>,
}

impl Stored {
    fn new(keys: &[f32], values: &[f32], hd: usize) -> Self {
        let (tokens, words) = (keys.len() / hd, page_words(hd));
        let count = tokens.div_ceil(PAGE);
        // Stale contents of a previous owner: NaN everywhere.
        let mut layer = vec![0x7fc0_7fc0; count * 2 * words];
        let table: Vec<u32> = (0..count as u32).rev().collect();
        for t in 0..tokens {
            let (at, page) = (t * hd..(t + 1) * hd, table[t / PAGE] as usize);
            let page = &mut layer[(page * 2 + 1) * words..][..words];
            let (key, value) = page.split_at_mut(words / 2);
            append_key(Isa::detect(), key, t % PAGE, &keys[at.clone()]);
            append_value(Isa::detect(), value, t % PAGE, &values[at]);
        }
        Self { layer, table }
    }

    fn pages(&self) -> Pages<'_> {
        Pages {
            layer: &self.layer,
            table: &self.table,
            heads: 2,
            head: 1,
        }
    }
}

fn run(isa: Isa, queries: &[Query<'_>], stored: &Stored) -> Vec<f32> {
    let hd = queries[0].head_dim();
    let mut queries = queries.to_vec();
    for (i, query) in queries.iter_mut().enumerate() {
        query.out = i * hd;
    }
    let mut scratch = Scratch::new(hd);
    let mut out = vec![f32::NAN; queries.len() * hd];
    attend(isa, &queries, stored.pages(), &mut scratch, &mut out);

    let spans = longest(&queries).div_ceil(SPAN);
    let width = queries.len() * partial_width(hd);
    for cut in [0, 1, spans / 2, spans - 1] {
        let mut partials = vec![f32::NAN; spans * width];
        let (first, second) = partials.split_at_mut(cut * width);
        for (spans, part) in [(cut..spans, second), (0..cut, first)] {
            attend_spans(isa, &queries, stored.pages(), spans, &mut scratch, part);
        }
        let mut split = vec![f32::NAN; queries.len() * hd];
        merge_spans(isa, &queries, &partials, &mut split);
        assert_eq!(split, out, "cut at {cut}");
    }
    out
}

fn round(x: &[f32]) -> Vec<f64> {
    x.iter()
        .map(|&v| half::bf16::from_f32(v).to_f64())
        .collect()
}

#[test]
fn follows_the_definition() {
    for (hd, tokens) in [(64, 1), (64, 33), (80, 64), (128, 65), (64, 300), (96, 129)] {
        let (k, v) = (random(tokens * hd, 1), random(tokens * hd, 2));
        let mut q: Vec<f32> = random(hd, 3).iter().map(|x| x * 3.0).collect();
        let mut ready = vec![0; hd / 2];
        prepare_query(Isa::detect(), &mut q, &mut ready);
        let out = run(
            Isa::detect(),
            &[Query {
                q: &ready,
                len: tokens,
                out: 0,
            }],
            &Stored::new(&k, &v, hd),
        );
        let (q, k, v) = (round(&q), round(&k), round(&v));
        let scores: Vec<f64> = (0..tokens)
            .map(|t| (0..hd).map(|d| q[d] * k[t * hd + d]).sum())
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp2()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..hd {
            let exact: f64 = (0..tokens).map(|t| weights[t] * v[t * hd + d]).sum::<f64>() / total;
            assert!(
                (f64::from(out[d]) - exact).abs() < 4e-3,
                "{hd} {tokens} {d}"
            );
        }
    }
}

#[test]
fn batch_and_instruction_set_change_no_bit() {
    for hd in [64, 80] {
        let tokens = 150;
        let (k, v) = (random(tokens * hd, 4), random(tokens * hd, 5));
        let pages = Stored::new(&k, &v, hd);
        let mut q = random(30 * hd, 6);
        let mut ready = vec![0; q.len() / 2];
        for (q, ready) in q.chunks_exact_mut(hd).zip(ready.chunks_exact_mut(hd / 2)) {
            prepare_query(Isa::detect(), q, ready);
        }
        let half = hd / 2;
        let queries: Vec<Query<'_>> = (0..30)
            .map(|i| Query {
                q: &ready[i * half..(i + 1) * half],
                len: 1 + i * 5,
                out: 0,
            })
            .collect();
        let together = run(Isa::Scalar, &queries, &pages);
        assert!(together.iter().all(|x| x.is_finite()));
        for isa in isas() {
            assert_eq!(run(isa, &queries, &pages), together, "{isa:?}");
            for (i, query) in queries.iter().enumerate() {
                // Alone, and as if the tokens after it had never been written.
                let len = query.len * hd;
                let own = Stored::new(&k[..len], &v[..len], hd);
                assert_eq!(
                    run(isa, &[*query], &own),
                    together[i * hd..(i + 1) * hd],
                    "{isa:?} {i}"
                );
            }
        }
    }
}
