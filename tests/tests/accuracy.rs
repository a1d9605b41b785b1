//! The CPU backend against the oracle, and its types of keys and values against one another, on a
//! text.

use shoal_core::{Role, TokenId};
use shoal_engine::candle::CandleWeights;
use shoal_gguf::Gguf;
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_tests::accuracy::{Bounds, Comparison};
use shoal_tests::backends::{candle, cpu, cpu_keeping, demo_gguf};
use shoal_tests::model::data;
use shoal_text::{EncodeOptions, Tokenizer, bundle_from_gguf};

/// Tokens of the text that are compared, as one context.
const TOKENS: usize = 2048;

fn text(gguf: &Gguf) -> Vec<TokenId> {
    let tokenizer =
        Tokenizer::new(&bundle_from_gguf(gguf).expect("a tokenizer")).expect("it is supported");
    let mut tokens = tokenizer
        .encode(&data("perplexity.txt"), EncodeOptions::default())
        .expect("it is supported");
    assert!(tokens.len() >= TOKENS, "{} tokens", tokens.len());
    tokens.truncate(TOKENS);
    tokens
}

#[test]
fn cpu_stays_near_float32() {
    let gguf = demo_gguf();
    let mut oracle = candle(&gguf, CandleWeights::F32);
    // What a prompt is computed with, and an output.
    let prompts = Bounds {
        mean_kl: 0.0008,
        top1: 0.98,
        perplexity: 0.002,
    };
    let outputs = Bounds {
        mean_kl: 0.004,
        top1: 0.96,
        perplexity: 0.01,
    };
    for (role, bounds) in [(Role::Prompt, prompts), (Role::Output, outputs)] {
        let comparison = Comparison::run(&mut oracle, &mut cpu(&gguf), &text(&gguf), role).unwrap();
        println!("{role:?}");
        comparison.assert_within(&bounds);
    }
}

#[test]
fn keys_and_values_stay_near_bf16() {
    let gguf = demo_gguf();
    let as_kept = |kv| cpu_keeping(kv, &gguf, Isa::detect(), 2);
    let mut bf16 = as_kept(KvType::Bf16);
    for (kv, mean_kl, top1, perplexity) in [
        // bf16's own distance from float32, and no more.
        (KvType::Int16, 0.0003, 0.98, 0.002),
        (KvType::Int8, 0.002, 0.97, 0.01),
    ] {
        let role = Role::Prompt;
        let comparison = Comparison::run(&mut bf16, &mut as_kept(kv), &text(&gguf), role).unwrap();
        println!("{kv:?}");
        comparison.assert_within(&Bounds {
            mean_kl,
            top1,
            perplexity,
        });
    }
}
