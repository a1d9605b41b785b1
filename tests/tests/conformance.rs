//! Every weight type, family, rotation and mix of types, on small random models: the oracle
//! against plain loops, and the backends against the oracle.

use shoal_core::Class;
use shoal_engine::backend::{Backend, BackendError};
use shoal_engine::candle::CandleWeights;
use shoal_engine::cpu::{CpuBackend, CpuOptions, PromptPrecision};
use shoal_engine::spec::ModelSpec;
use shoal_gguf::testmodel::{Family, RopeScaling, TestModel};
use shoal_gguf::{GgmlType, Gguf};
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_tests::backends::{candle, cpu_keeping};
use shoal_tests::conformance::{relative_error, scenario};
use shoal_tests::naive::Naive;

const FAMILIES: [Family; 3] = [Family::Llama, Family::Qwen2, Family::Qwen3];

/// Additions of float32 in another order.
const FLOAT: f64 = 2e-5;
/// Queries, keys, values and the weights of attention with 13 bits of their greatest.
const INT16_ATTENTION: f64 = 1e-3;
/// The same in bf16, with 8 bits of precision.
const BF16_ATTENTION: f64 = 7e-3;
/// Activations in blocks of 32, or keys and values of a head, with one scale and 8 bits: half a
/// percent for each product.
const INT8: f64 = 2.5e-2;
/// The same of candle's kernels, which round more.
const CANDLE_INT8: f64 = 4e-2;

fn is_float(ty: GgmlType) -> bool {
    matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
}

/// Runs the scenario on every backend.
fn check(model: &TestModel) {
    let name = format!("{model:?}");
    let gguf = Gguf::parse(model.build().expect("a good model").to_bytes()).expect("a good file");
    let spec = ModelSpec::from_gguf(&gguf).expect("the model is supported");
    let oracle = scenario(&mut candle(&gguf, CandleWeights::F32)).expect("candle runs it");
    let naive = Naive::new(&gguf, &spec);
    for trace in &oracle {
        let error = relative_error(&naive.logits(&trace.tokens), &trace.logits);
        assert!(error <= FLOAT, "the oracle is off by {error}: {name}");
    }

    let quantised = model.mix.iter().any(|&(_, ty)| !is_float(ty)) || !is_float(model.weights);
    let near = |backend: &mut dyn Backend, bound: f64| {
        let results = scenario(backend).expect("the backend runs it");
        for (expected, got) in oracle.iter().zip(&results) {
            let error = relative_error(&expected.logits, &got.logits);
            assert!(
                error <= bound,
                "{} is off by {error}: {name}",
                backend.name()
            );
        }
        results
    };
    near(&mut candle(&gguf, CandleWeights::Quantized), CANDLE_INT8);
    for (kv, attention) in [
        (KvType::Int16, INT16_ATTENTION),
        (KvType::Bf16, BF16_ATTENTION),
        (KvType::Int8, INT8),
    ] {
        let bound = if quantised { INT8 } else { attention };
        let best = near(&mut cpu_keeping(kv, &gguf, Isa::detect(), 2), bound);
        let plain = near(&mut cpu_keeping(kv, &gguf, Isa::Scalar, 1), bound);
        assert!(best == plain, "instruction sets differ: {kv:?} {name}");
    }
}

#[test]
fn every_weight_type_of_llama() {
    GgmlType::all().for_each(|ty| check(&TestModel::tiny(Family::Llama, ty)));
}

#[test]
fn every_weight_type_of_qwen2() {
    GgmlType::all().for_each(|ty| check(&TestModel::tiny(Family::Qwen2, ty)));
}

#[test]
fn every_weight_type_of_qwen3() {
    GgmlType::all().for_each(|ty| check(&TestModel::tiny(Family::Qwen3, ty)));
}

#[test]
fn every_rotation() {
    let scalings = [
        RopeScaling::Linear { factor: 4.0 },
        RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32,
        },
        RopeScaling::Llama3 {
            factor: 8.0,
            original_context: 32,
        },
    ];
    for family in FAMILIES {
        for rope_scaling in scalings {
            check(&TestModel {
                rope_scaling,
                ..TestModel::tiny(family, GgmlType::F16)
            });
        }
    }
}

#[test]
fn every_shape() {
    let tiny = |family| TestModel::tiny(family, GgmlType::Q8_0);
    for family in FAMILIES {
        for tied_head in [false, true] {
            check(&TestModel {
                tied_head,
                ..tiny(family)
            });
        }
        // One key-value head; one for each query head; narrow and wide heads; a vocabulary
        // that ends within a strip.
        for (heads, kv_heads, head_dim) in [(4, 1, 64), (4, 4, 32), (6, 3, 16), (2, 1, 128)] {
            check(&TestModel {
                heads,
                kv_heads,
                head_dim,
                vocab: 517,
                ..tiny(family)
            });
        }
    }
    check(&TestModel {
        qkv_bias: true,
        ..tiny(Family::Llama)
    });
}

#[test]
fn every_mix_of_types() {
    use GgmlType::{BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0};
    let mixes: [(GgmlType, &[(&str, GgmlType)]); 5] = [
        // Q4_K_M.
        (
            Q4_K,
            &[
                ("attn_v.weight", Q6_K),
                ("ffn_down.weight", Q6_K),
                ("token_embd.weight", Q6_K),
            ],
        ),
        // Q4_K_M where some layers alone are of the better type.
        (
            Q4_K,
            &[("0.attn_v.weight", Q6_K), ("1.ffn_down.weight", Q6_K)],
        ),
        // Floats and blocks among the projections of one input, in the order of each.
        (
            Q4_0,
            &[
                ("attn_q.weight", F16),
                ("attn_v.weight", BF16),
                ("ffn_up.weight", F32),
            ],
        ),
        (Q8_0, &[("attn_k.weight", F32), ("ffn_gate.weight", F16)]),
        // From layer to layer, and in the head.
        (
            Q4_1,
            &[
                ("0.attn_output.weight", BF16),
                ("1.ffn_down.weight", F16),
                ("0.attn_q.weight", Q5_0),
                ("token_embd.weight", F16),
                ("output.weight", F32),
            ],
        ),
    ];
    for family in FAMILIES {
        for (weights, mix) in mixes {
            let mut model = TestModel::tiny(family, weights);
            model.mix = mix
                .iter()
                .map(|&(name, ty)| (name.to_owned(), ty))
                .collect();
            check(&model);
        }
    }
}

#[test]
fn shapes_that_the_kernels_cannot_run_are_refused() {
    let tiny = || TestModel::tiny(Family::Llama, GgmlType::F32);
    let refusals = [
        (
            TestModel {
                d_model: 80,
                ..tiny()
            },
            "the model's width is 80, not a multiple of 32",
        ),
        (
            TestModel {
                heads: 3,
                kv_heads: 1,
                head_dim: 16,
                ..tiny()
            },
            "the width of all heads is 48, not a multiple of 32",
        ),
        (
            TestModel {
                head_dim: 24,
                ..tiny()
            },
            "the width of a head is 24, not a multiple of 16",
        ),
        (
            TestModel {
                d_ff: 100,
                ..tiny()
            },
            "the feed-forward width is 100, not a multiple of 32",
        ),
        (
            TestModel {
                heads: 64,
                kv_heads: 1,
                head_dim: 16,
                ..tiny()
            },
            "64 query heads share a key-value head, at most 32 can",
        ),
    ];
    for (model, words) in refusals {
        let error = load(&model).err().expect("a refusal");
        assert_eq!(error.to_string(), words);
        assert_eq!(error.class(), Class::Fatal);
    }
}

fn load(model: &TestModel) -> Result<CpuBackend, BackendError> {
    let file = model.build().expect("a good model").to_bytes();
    let gguf = Gguf::parse(file).expect("a good file");
    let spec = ModelSpec::from_gguf(&gguf).expect("the model is supported");
    let options = CpuOptions {
        isa: Isa::detect(),
        prompts: PromptPrecision::Bf16,
        threads: 1,
        kv: KvType::default(),
        pages: 1,
        max_rows: 1,
        max_logit_rows: 1,
    };
    CpuBackend::load(&gguf, spec, options)
}
