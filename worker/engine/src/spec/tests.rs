//! What a file must say, each refusal by its words.

use shoal_core::Class;
use shoal_gguf::testmodel::{Family, RopeScaling, TestModel};
use shoal_gguf::{GgmlType, Gguf, GgufWriter, Value, quantize};

use super::{Architecture, ModelSpec, RopeKind, SpecError};

/// A change of a good file. Keys that begin with a dot stand under the architecture.
enum Edit {
    Set(&'static str, Value),
    Remove(&'static str),
    /// A tensor of ones.
    Tensor(&'static str, GgmlType, Vec<usize>),
    RemoveTensor(&'static str),
}

fn set(key: &'static str, value: impl Into<Value>) -> Edit {
    Edit::Set(key, value.into())
}

fn ones(name: &'static str, shape: &[usize]) -> Edit {
    Edit::Tensor(name, GgmlType::F32, shape.to_vec())
}

fn tiny(family: Family) -> TestModel {
    TestModel {
        layers: 1,
        ..TestModel::tiny(family, GgmlType::F32)
    }
}

fn read(model: &TestModel, edits: &[Edit]) -> Result<ModelSpec, SpecError> {
    let good = Gguf::parse(model.build().unwrap().to_bytes()).unwrap();
    let full = |key: &str| match key.strip_prefix('.') {
        Some(name) => format!("{}.{name}", model.family.name()),
        None => key.to_owned(),
    };
    let edits_key = |edit: &Edit, key: &str| match edit {
        Edit::Set(edited, _) | Edit::Remove(edited) => full(edited) == key,
        _ => false,
    };
    let edits_tensor = |edit: &Edit, name: &str| match edit {
        Edit::Tensor(edited, ..) | Edit::RemoveTensor(edited) => *edited == name,
        _ => false,
    };
    let mut file = GgufWriter::new();
    for (key, value) in good.entries() {
        if !edits.iter().any(|edit| edits_key(edit, key)) {
            file.metadata(key, value.clone()).unwrap();
        }
    }
    for tensor in good.tensors() {
        if !edits.iter().any(|edit| edits_tensor(edit, tensor.name)) {
            file.tensor(tensor.name, tensor.ty, tensor.shape, tensor.data)
                .unwrap();
        }
    }
    for edit in edits {
        match edit {
            Edit::Set(key, value) => file.metadata(&full(key), value.clone()).unwrap(),
            Edit::Tensor(name, ty, shape) => {
                let data = quantize(*ty, &vec![1.0; shape.iter().product()]);
                file.tensor(name, *ty, shape, data).unwrap();
            }
            Edit::Remove(_) | Edit::RemoveTensor(_) => {}
        }
    }
    ModelSpec::from_gguf(&Gguf::parse(file.to_bytes()).unwrap())
}

fn spec(edits: &[Edit]) -> ModelSpec {
    read(&tiny(Family::Llama), edits).unwrap()
}

#[track_caller]
fn refused(edits: &[Edit], words: &str) {
    let error = read(&tiny(Family::Llama), edits).unwrap_err();
    assert_eq!(error.to_string(), words);
    assert_eq!(error.class(), Class::Fatal);
}

#[test]
fn the_shape_of_each_family() {
    for (family, architecture, kind) in [
        (Family::Llama, Architecture::Llama, RopeKind::Interleaved),
        (Family::Qwen2, Architecture::Qwen2, RopeKind::Halves),
        (Family::Qwen3, Architecture::Qwen3, RopeKind::Halves),
    ] {
        let spec = read(&tiny(family), &[]).unwrap();
        assert_eq!((spec.architecture, spec.rope.kind), (architecture, kind));
        assert_eq!(spec.name, format!("test {} F32", family.name()));
        assert_eq!(spec.quantization, "F32");
        assert_eq!((spec.n_layer, spec.d_model, spec.d_ff), (1, 256, 512));
        assert_eq!((spec.n_head, spec.n_kv_head, spec.head_dim), (4, 2, 64));
        assert_eq!((spec.vocab, spec.context, spec.rms_eps), (512, 512, 1e-5));
        assert_eq!((spec.rope.inv_freq.len(), spec.rope.magnitude), (32, 1.0));
        assert_eq!(spec.qkv_bias, family == Family::Qwen2);
        assert_eq!(spec.qk_norm, family == Family::Qwen3);
        assert_eq!(spec.tied_head, family == Family::Llama);
    }
}

#[test]
fn what_a_file_need_not_say() {
    let spec = spec(&[
        Edit::Remove("general.name"),
        Edit::Remove(".attention.key_length"),
        Edit::Remove(".attention.value_length"),
        Edit::Remove(".rope.dimension_count"),
        Edit::Remove(".rope.freq_base"),
        set(".expert_count", 0u32),
        set(".rope.scaling.type", "none"),
        set(".rope.scaling.factor", 4f32),
    ]);
    assert_eq!((spec.name.as_str(), spec.head_dim), ("llama", 64));
    assert_eq!((spec.rope.inv_freq[0], spec.rope.inv_freq[16]), (1.0, 0.01));
}

#[test]
fn every_query_head_has_its_own_keys_unless_the_file_says_otherwise() {
    let model = TestModel {
        kv_heads: 4,
        ..tiny(Family::Llama)
    };
    let spec = read(&model, &[Edit::Remove(".attention.head_count_kv")]).unwrap();
    assert_eq!(spec.n_kv_head, 4);
}

#[test]
fn a_window_bounds_the_context() {
    assert_eq!(
        spec(&[set(".attention.sliding_window", 128u32)]).context,
        128
    );
    assert_eq!(spec(&[set(".attention.sliding_window", 0u32)]).context, 512);
    assert_eq!(
        spec(&[set(".attention.sliding_window", 4096u32)]).context,
        512
    );
}

#[test]
fn architectures() {
    refused(
        &[set("general.architecture", "gpt2")],
        "architecture `gpt2` is not supported; supported are llama, qwen2, qwen3",
    );
    refused(
        &[Edit::Remove("general.architecture")],
        "metadata key general.architecture is missing",
    );
    refused(
        &[set("general.architecture", 7u32)],
        "metadata `general.architecture` is u32 7, not a string",
    );
}

#[test]
fn features_that_no_backend_has() {
    refused(
        &[set(".expert_count", 8u32)],
        "mixture of experts is not supported (llama.expert_count = 8)",
    );
    refused(
        &[set(".attention.scale", 0.5f32)],
        "a scale of its own for attention is not supported (llama.attention.scale = 0.5)",
    );
    refused(
        &[set(".rope.scaling.yarn_log_multiplier", 0.5f32)],
        "DeepSeek's variant of YaRN is not supported (llama.rope.scaling.yarn_log_multiplier = 0.5)",
    );
    refused(
        &[set(".attention.value_length", 32u32)],
        "a value head of another width than the key head is not supported \
         (llama.attention.value_length = 32)",
    );
    refused(
        &[set(".rope.scaling.type", "longrope")],
        "this scaling of positions is not supported (llama.rope.scaling.type = longrope)",
    );
    refused(
        &[
            set(".rope.scaling.type", "yarn"),
            set(".rope.scaling.yarn_ext_factor", 0.5f32),
        ],
        "partial YaRN is not supported (llama.rope.scaling.yarn_ext_factor = 0.5)",
    );
}

#[test]
fn counts() {
    for (key, limit) in [
        (".block_count", 1 << 10),
        (".embedding_length", 1 << 17),
        (".attention.head_count", 1 << 11),
        (".context_length", 1 << 24),
        (".feed_forward_length", 1 << 19),
    ] {
        let full = format!("llama{key}");
        refused(
            &[Edit::Remove(key)],
            &format!("metadata key {full} is missing"),
        );
        for bad in [0, limit + 1] {
            refused(
                &[set(key, bad as u32)],
                &format!("metadata key {full}: {bad} is not within 1 and {limit}"),
            );
        }
    }
    // One value for each layer, as models of varying layers have.
    refused(
        &[set(".attention.head_count", vec![4u32])],
        "metadata `llama.attention.head_count` is an array of 1 u32, not u32",
    );
    refused(
        &[set(".attention.head_count_kv", 3u32)],
        "metadata key llama.attention.head_count_kv: 3 does not divide the 4 query heads",
    );
}

#[test]
fn numbers() {
    const EPS: &str = ".attention.layer_norm_rms_epsilon";
    refused(
        &[Edit::Remove(EPS)],
        "metadata key llama.attention.layer_norm_rms_epsilon is missing",
    );
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        for (key, edits) in [
            (EPS, vec![set(EPS, bad)]),
            (".rope.freq_base", vec![set(".rope.freq_base", bad)]),
            (
                ".rope.scaling.factor",
                vec![set(".rope.scaling.factor", bad)],
            ),
        ] {
            refused(
                &edits,
                &format!("metadata key llama{key}: {bad} is no positive number"),
            );
        }
    }
    refused(
        &[set(".rope.freq_base", 1f32)],
        "metadata key llama.rope.freq_base: 1 is not above 1",
    );
}

#[test]
fn heads() {
    refused(
        &[set(".attention.key_length", 63u32)],
        "metadata key llama.attention.key_length: a head of 63 elements has no pairs to rotate",
    );
    for bad in [66u32, 31] {
        refused(
            &[set(".rope.dimension_count", bad)],
            &format!(
                "metadata key llama.rope.dimension_count: \
                 {bad} elements cannot rotate in a head of 64"
            ),
        );
    }
}

#[test]
fn tensors() {
    refused(
        &[Edit::RemoveTensor("blk.0.ffn_up.weight")],
        "tensor blk.0.ffn_up.weight: is missing",
    );
    refused(
        &[Edit::RemoveTensor("token_embd.weight")],
        "tensor token_embd.weight: is missing",
    );
    refused(
        &[set(".block_count", 2u32)],
        "tensor blk.1.attn_norm.weight: is missing",
    );
    refused(
        &[ones("blk.0.attn_k.weight", &[256, 256])],
        "tensor blk.0.attn_k.weight: has shape [256, 256], the model needs [128, 256]",
    );
    refused(
        &[Edit::Tensor(
            "output_norm.weight",
            GgmlType::Q8_0,
            vec![256],
        )],
        "tensor output_norm.weight: is a vector of the block type Q8_0",
    );
    refused(
        &[ones("blk.0.ffn_gate_inp.weight", &[8, 256])],
        "tensor blk.0.ffn_gate_inp.weight: has no place in llama",
    );
    // A bias of q makes those of k and v needed.
    refused(
        &[ones("blk.0.attn_q.bias", &[256])],
        "tensor blk.0.attn_k.bias: is missing",
    );
    let error = read(
        &tiny(Family::Qwen3),
        &[Edit::RemoveTensor("blk.0.attn_q_norm.weight")],
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "tensor blk.0.attn_q_norm.weight: is missing"
    );
}

#[test]
fn divisors_of_frequencies() {
    for edit in [
        ones("rope_freqs.weight", &[31]),
        ones("rope_freqs.weight", &[1, 32]),
        Edit::Tensor("rope_freqs.weight", GgmlType::F16, vec![32]),
    ] {
        refused(
            &[edit],
            "tensor rope_freqs.weight: is no F32 vector of 32, one for each pair",
        );
    }
    let plain = spec(&[]).rope;
    assert_eq!(spec(&[ones("rope_freqs.weight", &[32])]).rope, plain);
}

/// Llama 3.1's scaling (base 5e5, 128 dims, factor 8, low 1, high 4, over 8,192): the values
/// of `transformers`' `_compute_llama3_parameters`, computed apart from this code.
#[test]
fn llama3_scaling_through_the_file() {
    const FREQUENCIES: [(usize, f64); 8] = [
        (0, 1.000000000000e+00),
        (20, 1.656044008099e-02),
        (28, 3.211445994753e-03),
        (29, 2.166570763503e-03),
        (31, 8.567514129196e-04),
        (34, 1.785078127680e-04),
        (40, 3.428102195953e-05),
        (63, 3.068925988915e-07),
    ];
    let model = TestModel {
        heads: 2,
        head_dim: 128,
        rope_base: 500_000.0,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            original_context: 8192,
        },
        ..tiny(Family::Llama)
    };
    let rope = read(&model, &[]).unwrap().rope;
    for (pair, expected) in FREQUENCIES {
        let got = f64::from(rope.inv_freq[pair]);
        assert!((got / expected - 1.0).abs() < 1e-5, "{pair}: {got}");
    }
}

#[test]
fn scalings_through_the_file() {
    let plain = spec(&[]).rope;
    // The type is linear unless it is given; the older key says the same.
    for edits in [
        vec![set(".rope.scaling.factor", 4f32)],
        vec![set(".rope.scale_linear", 4f32)],
        vec![
            set(".rope.scaling.type", "linear"),
            set(".rope.scaling.factor", 4f32),
        ],
    ] {
        let rope = spec(&edits).rope;
        assert_eq!(rope.inv_freq[0], 0.25);
        assert_eq!(rope.inv_freq[16], plain.inv_freq[16] / 4.0);
    }
    // YaRN's original context is the model's unless it is given.
    let yarn = |edits: Vec<Edit>| {
        let mut all = vec![
            set(".rope.scaling.type", "yarn"),
            set(".rope.scaling.factor", 4f32),
        ];
        all.extend(edits);
        spec(&all).rope
    };
    const ORIGINAL: &str = ".rope.scaling.original_context_length";
    assert_eq!(yarn(vec![]), yarn(vec![set(ORIGINAL, 512u32)]));
    assert_ne!(yarn(vec![]), yarn(vec![set(ORIGINAL, 128u32)]));
    let (fast, slow) = (
        ".rope.scaling.yarn_beta_fast",
        ".rope.scaling.yarn_beta_slow",
    );
    assert_eq!(yarn(vec![]), yarn(vec![set(fast, 32f32), set(slow, 1f32)]));
    assert_ne!(yarn(vec![]), yarn(vec![set(fast, 16f32)]));
    let doubled = yarn(vec![set(".rope.scaling.attn_factor", 2f32)]);
    assert_eq!(doubled.magnitude, 2.0 * yarn(vec![]).magnitude);
}
