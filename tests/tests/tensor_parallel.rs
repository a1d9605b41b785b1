//! Tensor-parallel groups: what the ranks compute together is what one computes alone, but for
//! the order of sums, and every rank has the same bits.

use shoal_collective::tcp::Payload;
use shoal_core::{Role, TokenId};
use shoal_engine::backend::Backend;
use shoal_engine::candle::CandleWeights;
use shoal_engine::cpu::CpuOptions;
use shoal_gguf::testmodel::{Family, TestModel};
use shoal_gguf::{GgmlType, Gguf};
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_tests::accuracy::{Bounds, Comparison, log_softmax, top2};
use shoal_tests::backends::{CpuGroup, candle, cpu, cpu_as, cpu_keeping, demo_gguf, options};
use shoal_tests::conformance::{relative_error, scenario};
use shoal_tests::drive::{Sequence, append, assert_rows_without_logits_change_nothing};
use shoal_tests::model::data;
use shoal_text::{EncodeOptions, Tokenizer, bundle_from_gguf};

/// Tokens that are compared with float32, as one context.
const TOKENS: usize = 1024;

/// Where the two best tokens are further apart, in nats, every split chooses the same.
const CLEAR_MARGIN: f64 = 0.5;

fn group(gguf: &Gguf, world: usize, threads: usize) -> CpuGroup {
    CpuGroup::new(gguf, world, &options(Isa::detect(), threads))
}

fn text(gguf: &Gguf) -> Vec<TokenId> {
    let bundle = bundle_from_gguf(gguf).expect("a tokenizer");
    let tokenizer = Tokenizer::new(&bundle).expect("a tokenizer");
    let tokens = tokenizer.encode(&data("perplexity.txt"), EncodeOptions::default());
    tokens.expect("a short text")
}

#[test]
fn groups_of_two_and_three_stay_near_float32() {
    let gguf = demo_gguf();
    let tokens = &text(&gguf)[..TOKENS];
    for world in [2, 3] {
        let mut oracle = candle(&gguf, CandleWeights::F32);
        let mut group = group(&gguf, world, 1);
        let comparison = Comparison::run(&mut oracle, &mut group, tokens, Role::Prompt).unwrap();
        comparison.assert_within(&Bounds {
            mean_kl: 0.004,
            top1: 0.95,
            perplexity: 0.01,
        });
    }
}

/// Follows one process's own choices; each rank count must choose the same wherever the choice
/// is clear.
#[test]
fn clear_choices_are_those_of_one_process() {
    let gguf = demo_gguf();
    let text = text(&gguf);
    let mut alone = cpu(&gguf);
    let mut groups = [2, 3, 5].map(|world| group(&gguf, world, 1));
    let vocab = alone.spec().vocab;
    for prompt in text.chunks(37).take(8) {
        let mut sequence = Sequence::new((0..4).collect());
        let mut sequences = [(); 3].map(|()| sequence.clone());
        let mut tokens = prompt.to_vec();
        for _ in 0..24 {
            let logits = append(&mut alone, &mut sequence, &tokens, Role::Output).unwrap();
            let expected = log_softmax(&logits[logits.len() - vocab..]);
            let [best, second] = top2(&expected);
            for (group, sequence) in groups.iter_mut().zip(&mut sequences) {
                let logits = append(group, sequence, &tokens, Role::Output).unwrap();
                let got = top2(&log_softmax(&logits[logits.len() - vocab..]))[0];
                let margin = expected[best] - expected[second];
                assert!(
                    got == best || margin < CLEAR_MARGIN,
                    "{} ranks chose {got}, not {best}, against {margin:.2}",
                    group.ranks()
                );
            }
            tokens = vec![best as TokenId];
        }
    }
}

#[test]
fn batches_chunks_and_threads_change_no_bit_of_a_group() {
    let gguf = demo_gguf();
    let tokens: Vec<TokenId> = (0..150).map(|t| 61 * t + 5).collect();
    let run = |group: &mut CpuGroup, chunk: usize| logits(group, &tokens, chunk);
    for world in [2, 3] {
        let mut group_of_one = group(&gguf, world, 1);
        let whole = run(&mut group_of_one, 150);
        assert!(run(&mut group_of_one, 7) == whole, "chunks");
        assert_rows_without_logits_change_nothing(&mut group_of_one);
        assert!(run(&mut group(&gguf, world, 2), 64) == whole, "threads");
    }
}

/// Logits of a prompt of `tokens`, in chunks.
fn logits(group: &mut CpuGroup, tokens: &[TokenId], chunk: usize) -> Vec<f32> {
    let mut sequence = Sequence::scattered(group);
    let chunks = tokens.chunks(chunk);
    chunks
        .flat_map(|part| append(group, &mut sequence, part, Role::Prompt).expect("a step"))
        .collect()
}

#[test]
fn over_tcp_floats_give_the_bits_of_shared_memory() {
    let gguf = demo_gguf();
    let tokens: Vec<TokenId> = (0..70).map(|t| 61 * t + 5).collect();
    for world in [2, 3] {
        let options = options(Isa::detect(), 1);
        let mut memory = CpuGroup::new(&gguf, world, &options);
        let mut tcp = CpuGroup::over_tcp(&gguf, world, &options, Payload::F32);
        assert_eq!(tcp.numerics_id(), memory.numerics_id());
        let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let expected = bits(logits(&mut memory, &tokens, 64));
        assert!(
            bits(logits(&mut tcp, &tokens, 23)) == expected,
            "{world} ranks"
        );
    }
}

/// Every step checks that all ranks have the same residual, which they have of rounded parts.
#[test]
fn rounded_payloads_stay_near_float32_and_obey_the_same_law() {
    let gguf = demo_gguf();
    let tokens = &text(&gguf)[..TOKENS];
    for (payload, mean_kl) in [(Payload::Bf16, 0.004), (Payload::Int8, 0.008)] {
        let options = options(Isa::detect(), 1);
        let mut oracle = candle(&gguf, CandleWeights::F32);
        let mut group = CpuGroup::over_tcp(&gguf, 2, &options, payload);
        let comparison = Comparison::run(&mut oracle, &mut group, tokens, Role::Prompt).unwrap();
        comparison.assert_within(&Bounds {
            mean_kl,
            top1: 0.94,
            perplexity: 0.01,
        });
        let whole = logits(&mut group, &tokens[..100], 100);
        assert!(logits(&mut group, &tokens[..100], 7) == whole, "chunks");
    }
}

/// Models of every weight type, with all that a family adds, split evenly and not.
#[test]
fn small_models_of_every_type_agree_with_one_process() {
    for (index, weights) in GgmlType::all().enumerate() {
        let family = [Family::Llama, Family::Qwen2, Family::Qwen3][index % 3];
        let file = TestModel {
            heads: 12,
            kv_heads: 3,
            d_ff: 768,
            vocab: 600,
            ..TestModel::tiny(family, weights)
        };
        let gguf = Gguf::parse(file.build().unwrap().to_bytes()).unwrap();
        let alone = scenario(&mut cpu_as(&gguf, Isa::detect(), 2)).unwrap();
        for world in [2, 3, 5] {
            let options = CpuOptions {
                pages: 8,
                max_rows: 64,
                max_logit_rows: 64,
                ..options(Isa::detect(), 1)
            };
            let together = scenario(&mut CpuGroup::new(&gguf, world, &options)).unwrap();
            for (alone, together) in alone.iter().zip(&together) {
                let error = relative_error(&alone.logits, &together.logits);
                assert!(error < 0.02, "{weights}, {world} ranks: {error}");
            }
        }
    }
}

#[test]
fn ids_tell_splits_payloads_and_types_of_keys_apart() {
    let model = TestModel::tiny(Family::Llama, GgmlType::Q4_1);
    let gguf = Gguf::parse(model.build().unwrap().to_bytes()).unwrap();
    let alone = cpu_as(&gguf, Isa::detect(), 1).numerics_id();
    let [two, again, four] = [2, 2, 4].map(|world| group(&gguf, world, 1).numerics_id());
    assert_eq!(two, again);
    assert!(alone != two && alone != four && two != four);
    let [bf16, rounded] = [Payload::Bf16, Payload::Int8].map(|payload| {
        let options = options(Isa::detect(), 1);
        CpuGroup::over_tcp(&gguf, 2, &options, payload).numerics_id()
    });
    assert!(bf16 != two && rounded != two && bf16 != rounded);
    for kv in [KvType::Bf16, KvType::Int8] {
        let other = cpu_keeping(kv, &gguf, Isa::detect(), 1).numerics_id();
        assert!(other != alone && other != two);
    }
}
