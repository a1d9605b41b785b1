//! The CPU backend on the demo model: the batch, its order, the chunks, the pages, the threads
//! and the instruction set change no bit of the logits.

use shoal_core::{Role, TokenId};
use shoal_engine::backend::Backend;
use shoal_engine::cpu::{CpuOptions, PromptPrecision};
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_tests::backends::{cpu_keeping, cpu_with, demo_gguf, options};
use shoal_tests::drive::{Sequence, Step, append, assert_rows_without_logits_change_nothing};

/// Sequences of 12, 45 and 78 tokens.
fn sequences() -> [Vec<TokenId>; 3] {
    [0u32, 1, 2].map(|i| (0..12 + 33 * i).map(|t| 1000 * i + 61 * t + 5).collect())
}

#[test]
fn nothing_changes_a_bit_of_prompts_in_bf16() {
    nothing_changes_a_bit(PromptPrecision::Bf16);
}

#[test]
fn nothing_changes_a_bit_of_prompts_in_tiles() {
    nothing_changes_a_bit(PromptPrecision::Bf16Tiles);
}

#[test]
fn nothing_changes_a_bit_of_prompts_in_int8() {
    nothing_changes_a_bit(PromptPrecision::Int8);
}

fn nothing_changes_a_bit(prompts: PromptPrecision) {
    let gguf = demo_gguf();
    let cpu_as = |isa, threads| {
        let options = options(isa, threads);
        cpu_with(&gguf, CpuOptions { prompts, ..options })
    };
    let mut backend = cpu_as(Isa::detect(), 2);
    let alone = sequences().map(|tokens| {
        let mut sequence = Sequence::new((0..8).collect());
        append(&mut backend, &mut sequence, &tokens, Role::Prompt).expect("a step")
    });

    // In one batch, on other pages, the last first.
    let mut step = Step::default();
    for (i, tokens) in (0..3).zip(sequences()).rev() {
        let mut sequence = Sequence::new((0..8).map(|page| 8 * i + 7 - page).collect());
        step.push(&mut sequence, &tokens, Role::Prompt);
    }
    let together = step.run(&mut backend).expect("a step");
    assert!(together == alone.iter().rev().flatten().copied().collect::<Vec<_>>());

    // In chunks beside another sequence, on one thread.
    let vocab = backend.spec().vocab;
    let mut backend = cpu_as(Isa::detect(), 1);
    for (chunk, tokens, expected) in sequences()
        .iter()
        .zip(&alone)
        .flat_map(|(tokens, expected)| [1, 7, 32].map(|chunk| (chunk, tokens, expected)))
    {
        let mut sequence = Sequence::scattered(&backend);
        let mut expected = &expected[..];
        for part in tokens.chunks(chunk) {
            let mut step = Step::default();
            step.push(&mut Sequence::new(vec![64]), &[5, 6], Role::Output);
            step.push(&mut sequence, part, Role::Prompt);
            let logits = step.run(&mut backend).expect("a step");
            let (these, rest) = expected.split_at(part.len() * vocab);
            assert!(logits[2 * vocab..] == *these, "chunks of {chunk}");
            expected = rest;
        }
    }

    assert_rows_without_logits_change_nothing(&mut backend);

    for isa in Isa::available() {
        let mut backend = cpu_as(isa, 2);
        let mut sequence = Sequence::scattered(&backend);
        let logits =
            append(&mut backend, &mut sequence, &sequences()[0], Role::Prompt).expect("a step");
        assert!(logits == alone[0], "{isa:?}");
    }
}

/// Long contexts are shared out among threads.
#[test]
fn nothing_changes_a_bit_of_a_long_context() {
    long_context(KvType::Int16);
}

#[test]
fn nor_of_one_in_bf16() {
    long_context(KvType::Bf16);
}

#[test]
fn nor_of_one_in_int8() {
    long_context(KvType::Int8);
}

fn long_context(kv: KvType) {
    let gguf = demo_gguf();
    let tokens: Vec<TokenId> = (0..600).map(|t| 61 * t % 40_000 + 5).collect();
    let run = |threads, chunk, beside| {
        let mut backend = cpu_keeping(kv, &gguf, Isa::detect(), threads);
        let vocab = backend.spec().vocab;
        let mut sequence = Sequence::new((20..60).rev().collect());
        let mut logits = Vec::new();
        for part in tokens.chunks(chunk) {
            let mut step = Step::default();
            for page in 0..beside {
                step.push(&mut Sequence::new(vec![page]), &[5, 6], Role::Output);
            }
            step.push(&mut sequence, part, Role::Prompt);
            let others = 2 * beside as usize * vocab;
            logits.extend_from_slice(&step.run(&mut backend).expect("a step")[others..]);
        }
        // A single row has the threads to itself.
        logits.extend(append(&mut backend, &mut sequence, &[7], Role::Output).expect("a step"));
        logits
    };
    let alone = run(2, 256, 0);
    assert!(run(1, 256, 0) == alone, "threads");
    assert!(run(2, 97, 9) == alone, "chunks");
    assert!(run(3, 31, 1) == alone, "more threads than processors");
    // Where the last row of a chunk alone wants logits.
    for threads in [1, 2, 3] {
        let mut backend = cpu_keeping(kv, &gguf, Isa::detect(), threads);
        let vocab = backend.spec().vocab;
        let mut sequence = Sequence::new((20..60).rev().collect());
        let mut row = 0;
        for part in tokens.chunks(97) {
            let mut step = Step::default();
            step.push(&mut sequence, part, Role::Prompt);
            let step = step.wanting(&[part.len() as u32 - 1]);
            row += part.len();
            let logits = step.run(&mut backend).expect("a step");
            assert!(
                logits == alone[(row - 1) * vocab..][..vocab],
                "row {row}, {threads} threads"
            );
        }
    }
}
