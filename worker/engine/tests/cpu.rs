//! The CPU backend on the demo model: near float32, and the same bits however a sequence is
//! batched, chunked, placed or computed.
//!
//! `tests/data/greedy-f32.json` was made with transformers in float32 on the dequantised weights.

use std::path::PathBuf;

use shoal_core::{PAGE_TOKENS, Role};
use shoal_engine::backend::{Backend, Batch, Segment};
use shoal_engine::cpu::{CpuBackend, CpuOptions};
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;

fn model_path() -> PathBuf {
    let cache = || {
        let home = PathBuf::from(std::env::var_os("HOME").unwrap());
        home.join(".cache/shoal/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    let path = std::env::var_os("SHOAL_TEST_MODEL").map_or_else(cache, PathBuf::from);
    assert!(
        path.exists(),
        "no demo model at {}: run tests/run",
        path.display()
    );
    path
}

fn backend(isa: Isa, threads: usize) -> CpuBackend {
    let gguf = Gguf::open(&model_path()).unwrap();
    let spec = ModelSpec::from_gguf(&gguf).unwrap();
    let options = CpuOptions {
        isa,
        threads,
        pages: 64,
        max_rows: 256,
        max_logit_rows: 64,
    };
    CpuBackend::load(&gguf, spec, options).unwrap()
}

/// A sequence that stores its tokens in pages of its own choice.
struct Sequence {
    pages: Vec<u32>,
    len: usize,
}

impl Sequence {
    fn new(pages: impl IntoIterator<Item = u32>) -> Self {
        Self {
            pages: pages.into_iter().collect(),
            len: 0,
        }
    }
}

/// One step: the last row of each part wants logits.
fn step(backend: &mut CpuBackend, parts: &mut [(&mut Sequence, &[u32])]) -> Vec<Vec<f32>> {
    let (mut tokens, mut positions, mut page_table) = (vec![], vec![], vec![]);
    let (mut segments, mut logit_rows) = (vec![], vec![]);
    for (sequence, new) in parts.iter_mut() {
        let (row, page) = (tokens.len() as u32, page_table.len() as u32);
        tokens.extend_from_slice(new);
        positions.extend((0..new.len()).map(|i| (sequence.len + i) as u32));
        page_table.extend_from_slice(&sequence.pages);
        segments.push(Segment {
            rows: row..tokens.len() as u32,
            pages: page..page_table.len() as u32,
            role: Role::Prompt,
        });
        logit_rows.push(tokens.len() as u32 - 1);
        sequence.len += new.len();
        assert!(sequence.len <= sequence.pages.len() * PAGE_TOKENS);
    }
    let vocab = backend.spec().vocab;
    let mut logits = vec![0.0; logit_rows.len() * vocab];
    let batch = Batch {
        tokens: &tokens,
        positions: &positions,
        segments: &segments,
        page_table: &page_table,
        logit_rows: &logit_rows,
    };
    backend.step(&batch, &mut logits).unwrap();
    logits.chunks(vocab).map(<[f32]>::to_vec).collect()
}

fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}

fn logprob(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    f64::from(logits[token as usize] - max) - sum.ln()
}

fn references() -> Vec<(Vec<u32>, Vec<u32>, Vec<(u32, f64)>)> {
    let text = include_str!("../../../tests/data/greedy-f32.json");
    let cases: serde_json::Value = serde_json::from_str(text).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect()
    };
    cases
        .as_array()
        .unwrap()
        .iter()
        .map(|case| {
            let top = case["first_top2"].as_array().unwrap();
            let top = top
                .iter()
                .map(|t| (t[0].as_u64().unwrap() as u32, t[1].as_f64().unwrap()));
            (
                ids(&case["prompt_ids"]),
                ids(&case["reference_ids"]),
                top.collect(),
            )
        })
        .collect()
}

#[test]
fn first_tokens_follow_float32() {
    let mut backend = backend(Isa::detect(), 2);
    for (prompt, reference, top) in references() {
        let mut sequence = Sequence::new(0..16);
        let logits = step(&mut backend, &mut [(&mut sequence, &prompt)]).remove(0);
        for &(token, expected) in &top {
            let got = logprob(&logits, token);
            assert!(
                (got - expected).abs() < 0.35,
                "{token}: {got} against {expected}"
            );
        }
        if top[0].1 - top[1].1 > 0.5 {
            assert_eq!(best(&logits), reference[0]);
        }
    }
}

#[test]
fn batch_chunks_pages_threads_and_instruction_set_change_no_bit() {
    let cases = references();
    let mut two = backend(Isa::detect(), 2);
    let alone: Vec<Vec<f32>> = cases
        .iter()
        .take(4)
        .map(|(prompt, ..)| step(&mut two, &mut [(&mut Sequence::new(0..8), prompt)]).remove(0))
        .collect();

    // All in one batch, on other pages.
    let mut sequences: Vec<Sequence> = (0..4)
        .map(|i| Sequence::new((0..8).map(|p| 8 * i + 7 - p)))
        .collect();
    let mut parts: Vec<(&mut Sequence, &[u32])> = sequences
        .iter_mut()
        .zip(&cases)
        .map(|(sequence, (prompt, ..))| (sequence, prompt.as_slice()))
        .collect();
    assert!(step(&mut two, &mut parts) == alone);

    // In chunks, beside another sequence, on one thread.
    let mut one = backend(Isa::detect(), 1);
    for chunk in [1, 7, 32] {
        for (index, (prompt, ..)) in cases.iter().take(4).enumerate() {
            let mut sequence = Sequence::new([40, 3, 17, 5, 29, 11, 2, 8]);
            let mut other = Sequence::new(50..60);
            let mut last = Vec::new();
            for new in prompt.chunks(chunk) {
                last = step(&mut one, &mut [(&mut other, &[5, 6]), (&mut sequence, new)]).remove(1);
            }
            assert!(last == alone[index], "chunks of {chunk}");
        }
    }

    for isa in Isa::available() {
        let mut backend = backend(isa, 2);
        let (prompt, ..) = &cases[0];
        let logits = step(
            &mut backend,
            &mut [(&mut Sequence::new(0..8), &prompt[..12])],
        )
        .remove(0);
        let expected = step(&mut two, &mut [(&mut Sequence::new(0..8), &prompt[..12])]).remove(0);
        assert!(logits == expected, "{isa:?}");
    }
}

#[test]
fn greedy_answers_are_those_of_the_reference_where_it_is_sure() {
    let mut backend = backend(Isa::detect(), 2);
    let mut agreed = 0;
    let mut all = 0;
    for (prompt, reference, _) in references() {
        let mut sequence = Sequence::new(0..16);
        let mut logits = step(&mut backend, &mut [(&mut sequence, &prompt)]).remove(0);
        // Teacher-forced: a near tie must not derail the rest.
        for &token in reference.iter().take(24) {
            agreed += usize::from(best(&logits) == token);
            all += 1;
            logits = step(&mut backend, &mut [(&mut sequence, &[token])]).remove(0);
        }
    }
    assert!(agreed * 100 >= all * 93, "{agreed} of {all}");
}
