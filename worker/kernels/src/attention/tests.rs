use super::*;
use crate::testing::{isas, random};

/// Pages of the second of two heads of the third of four layers, in reverse order.
struct Stored {
    kv: KvType,
    shape: PoolShape,
    pool: Vec<u32>,
    table: Vec<u32>,
}

impl Stored {
    fn new(kv: KvType, keys: &[f32], values: &[f32], hd: usize) -> Self {
        let (tokens, half) = (keys.len() / hd, kv.half_words(hd));
        let count = tokens.div_ceil(PAGE);
        // Stale contents of a previous owner: NaN everywhere.
        let shape = PoolShape {
            kv,
            layers: 4,
            heads: 2,
            dim: hd,
        };
        let mut pool = vec![0x7fc0_7fc0; shape.words(count)];
        let table: Vec<u32> = (0..count as u32).rev().collect();
        for t in 0..tokens {
            let (at, page) = (t * hd..(t + 1) * hd, table[t / PAGE] as usize);
            let page = &mut pool[shape.at(2, page, 1)..][..2 * half];
            let (key, value) = page.split_at_mut(half);
            append_value(Isa::detect(), kv, value, t % PAGE, &values[at.clone()]);
            let key = key.as_mut_ptr();
            // SAFETY: half a page for keys of this width.
            unsafe { append_key(Isa::detect(), kv, key, t % PAGE, &keys[at]) };
        }
        Self {
            kv,
            shape,
            pool,
            table,
        }
    }

    /// The keys and the values of so many tokens, as attention reads them.
    fn read(&self, tokens: usize, hd: usize) -> [Vec<f64>; 2] {
        let half = self.kv.half_words(hd);
        // Number `second` of pair `at`, by the scale of a token.
        let number = |words: &[u32], at: usize, second: usize, token: usize| match self.kv {
            KvType::Bf16 => half::bf16::from_bits((words[at] >> (16 * second)) as u16).to_f64(),
            KvType::Int16 => {
                let value = (words[at] >> (16 * second)) as i16;
                f64::from(value) * f64::from(f32::from_bits(words[half - PAGE + token]))
            }
            KvType::Int8 => {
                let byte = 2 * at + second;
                let value = (words[byte / 4] >> (8 * (byte % 4))) as i8;
                f64::from(value) * f64::from(f32::from_bits(words[half - PAGE + token]))
            }
        };
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for t in 0..tokens {
            let (page, token) = (self.table[t / PAGE] as usize, t % PAGE);
            let page = &self.pool[self.shape.at(2, page, 1)..][..2 * half];
            for d in 0..hd {
                let key = (token / LANES * (hd / 2) + d / 2) * LANES + token % LANES;
                keys.push(number(page, key, d % 2, token));
                let value = token / 2 * hd + d;
                values.push(number(&page[half..], value, token % 2, token));
            }
        }
        [keys, values]
    }

    fn pages(&self) -> Pages<'_> {
        Pages {
            pool: &self.pool,
            shape: self.shape,
            table: &self.table,
            layer: 2,
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
    let (pages, then) = (stored.pages(), stored.pages().span(0));
    attend(isa, &queries, pages, then, &mut scratch, &mut out);

    let spans = longest(&queries).div_ceil(SPAN);
    let width = queries.len() * partial_width(hd);
    for cut in [0, 1, spans / 2, spans - 1] {
        let mut partials = vec![f32::NAN; spans * width];
        let (first, second) = partials.split_at_mut(cut * width);
        for (spans, part) in [(cut..spans, second), (0..cut, first)] {
            attend_spans(isa, &queries, (pages, spans), then, &mut scratch, part);
        }
        let mut split = vec![f32::NAN; queries.len() * hd];
        merge_spans(isa, &queries, (None, 0, &partials), &mut split);
        assert_eq!(split, out, "cut at {cut}");

        if queries.iter().all(|query| query.len >= cut * SPAN) {
            let mut places = queries.clone();
            for (i, query) in places.iter_mut().enumerate() {
                query.out = i * partial_width(hd);
            }
            let mut begin = vec![f32::NAN; width];
            attend_first(isa, &places, (pages, cut), then, &mut scratch, &mut begin);
            let rest = &partials[cut * width..];
            merge_spans(isa, &queries, (Some(&begin), cut, rest), &mut split);
            assert_eq!(split, out, "begun with {cut}");
        }
    }
    out
}

#[test]
fn pages_hold_what_was_written() {
    for hd in [16, 64, 80] {
        let tokens = 45;
        // Keys a thousand times as large as values, and one of each that is zero.
        let mut k: Vec<f32> = random(tokens * hd, 1).iter().map(|x| x * 1e3).collect();
        let mut v = random(tokens * hd, 2);
        k[7 * hd..8 * hd].fill(0.0);
        v[44 * hd..].fill(0.0);
        for kv in KvType::ALL {
            let read = Stored::new(kv, &k, &v, hd).read(tokens, hd);
            for (written, read) in [&k, &v].into_iter().zip(&read) {
                for (written, read) in written.chunks_exact(hd).zip(read.chunks_exact(hd)) {
                    let most = written.iter().fold(0f32, |most, x| most.max(x.abs()));
                    for (&written, &read) in written.iter().zip(read) {
                        let written = f64::from(written);
                        let half_step = match kv {
                            KvType::Bf16 => written.abs() / 256.0,
                            // The product with the reciprocal is rounded, too.
                            KvType::Int16 => f64::from(most) / 8190.0 * 1.001,
                            KvType::Int8 => f64::from(most) / 254.0,
                        };
                        let error = (written - read).abs();
                        assert!(error <= half_step * (1.0 + 1e-5), "{kv:?} {written} {read}");
                    }
                }
            }
        }
    }
}

/// What is no number shows in its own token's scale, and to those alone that see it.
#[test]
fn a_fault_of_integers_stays_with_its_token() {
    for kv in [KvType::Int16, KvType::Int8] {
        a_fault_stays_with_its_token(kv);
    }
}

fn a_fault_stays_with_its_token(kv: KvType) {
    let (hd, tokens) = (64, 3);
    let mut k = random(tokens * hd, 1);
    k[hd + 5] = f32::INFINITY;
    let stored = Stored::new(kv, &k, &k, hd);
    let faults = |x: &[f64]| -> Vec<bool> {
        let rows = x.chunks_exact(hd);
        rows.map(|x| !x.iter().all(|x| x.is_finite())).collect()
    };
    for numbers in stored.read(tokens, hd) {
        assert_eq!(faults(&numbers), [false, true, false]);
    }
    let mut ready = vec![0; query_words(hd)];
    prepare_query(Isa::detect(), kv, &mut [1.0; 64], &mut ready);
    let queries = [1, 2, 3].map(|len| Query::new(&ready, len, (len - 1) * hd));
    for isa in isas() {
        let (mut scratch, mut out) = (Scratch::new(hd), vec![0.0; tokens * hd]);
        let (pages, then) = (stored.pages(), stored.pages().span(0));
        attend(isa, &queries, pages, then, &mut scratch, &mut out);
        let out: Vec<f64> = out.into_iter().map(f64::from).collect();
        assert_eq!(faults(&out), [false, true, true], "{kv:?} {isa:?}");
    }
}

#[test]
fn follows_the_definition() {
    let shapes = [(64, 1), (64, 33), (80, 64), (128, 65), (64, 300), (96, 129)];
    for (kv, (hd, tokens)) in KvType::ALL
        .into_iter()
        .flat_map(|kv| shapes.map(|s| (kv, s)))
    {
        let (k, v) = (random(tokens * hd, 1), random(tokens * hd, 2));
        let mut q: Vec<f32> = random(hd, 3).iter().map(|x| x * 3.0).collect();
        let mut ready = vec![0; query_words(hd)];
        prepare_query(Isa::detect(), kv, &mut q, &mut ready);
        let stored = Stored::new(kv, &k, &v, hd);
        let query = Query::new(&ready, tokens, 0);
        let out = run(Isa::detect(), &[query], &stored);
        let [k, v] = stored.read(tokens, hd);
        let read = |(d, &q): (usize, &f32)| match kv {
            KvType::Int16 | KvType::Int8 => {
                let value = (query.q[d / 2] >> (16 * (d % 2))) as i16;
                f64::from(value) * f64::from(query.scale)
            }
            KvType::Bf16 => half::bf16::from_f32(q).to_f64(),
        };
        let q: Vec<f64> = q.iter().enumerate().map(read).collect();
        let scores: Vec<f64> = (0..tokens)
            .map(|t| (0..hd).map(|d| q[d] * k[t * hd + d]).sum())
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp2()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..hd {
            let exact: f64 = (0..tokens).map(|t| weights[t] * v[t * hd + d]).sum::<f64>() / total;
            let error = (f64::from(out[d]) - exact).abs();
            let most = if kv == KvType::Bf16 { 4e-3 } else { 3e-4 };
            assert!(error < most, "{kv:?} {hd} {tokens} {d}: {error}");
        }
    }
}

#[test]
fn batch_and_instruction_set_change_no_bit() {
    for (kv, hd) in KvType::ALL.into_iter().flat_map(|kv| [(kv, 64), (kv, 80)]) {
        let tokens = 150;
        let (k, v) = (random(tokens * hd, 4), random(tokens * hd, 5));
        let pages = Stored::new(kv, &k, &v, hd);
        let mut q = random(30 * hd, 6);
        let words = query_words(hd);
        let mut ready = vec![0; 30 * words];
        for (q, ready) in q.chunks_exact_mut(hd).zip(ready.chunks_exact_mut(words)) {
            prepare_query(Isa::detect(), kv, q, ready);
        }
        let queries: Vec<Query<'_>> = ready
            .chunks_exact(words)
            .enumerate()
            .map(|(i, ready)| Query::new(ready, 1 + i * 5, 0))
            .collect();
        let together = run(Isa::Scalar, &queries, &pages);
        assert!(together.iter().all(|x| x.is_finite()));
        for isa in isas() {
            assert_eq!(run(isa, &queries, &pages), together, "{kv:?} {isa:?}");
            for (i, query) in queries.iter().enumerate() {
                // Alone, and as if the tokens after it had never been written.
                let len = query.len * hd;
                let own = Stored::new(kv, &k[..len], &v[..len], hd);
                assert_eq!(
                    run(isa, &[*query], &own),
                    together[i * hd..(i + 1) * hd],
                    "{kv:?} {isa:?} {i}"
                );
            }
        }
    }
}
