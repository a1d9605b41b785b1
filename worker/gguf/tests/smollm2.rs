//! The real demo model: SmolLM2-135M-Instruct, Q4_1.

use std::path::PathBuf;

use shoal_gguf::{GgmlType, Gguf, Strings, dequantize};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn model() -> Gguf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/shoal"));
    let path = std::env::var_os("SHOAL_TEST_MODEL")
        .map(PathBuf::from)
        .or_else(|| {
            let cache = std::env::var_os("SHOAL_CACHE")
                .map(PathBuf::from)
                .or_else(home)?;
            Some(cache.join("models").join(FILE))
        })
        .expect("SHOAL_TEST_MODEL, SHOAL_CACHE or HOME is set");
    Gguf::open(&path).unwrap_or_else(|error| {
        panic!(
            "the test model is needed (set SHOAL_TEST_MODEL): {error}: {}",
            path.display()
        )
    })
}

#[test]
fn metadata_is_what_the_model_says() {
    let gguf = model();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.entries().len(), 33);
    assert_eq!(
        gguf.require::<&str>("general.architecture").unwrap(),
        "llama"
    );
    for (key, value) in [
        ("block_count", 30),
        ("context_length", 8192),
        ("embedding_length", 576),
        ("feed_forward_length", 1536),
        ("attention.head_count", 9),
        ("attention.head_count_kv", 3),
        ("rope.dimension_count", 64),
        ("vocab_size", 49_152),
    ] {
        assert_eq!(
            gguf.require::<usize>(&format!("llama.{key}")).unwrap(),
            value,
            "{key}"
        );
    }
    assert_eq!(
        gguf.require::<f32>("llama.rope.freq_base").unwrap(),
        100_000.0
    );
    assert_eq!(
        gguf.require::<f32>("llama.attention.layer_norm_rms_epsilon")
            .unwrap(),
        1e-5
    );
    let tokens: &Strings = gguf.require("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 49_152);
    assert_eq!(tokens.get(0), Some("<|endoftext|>"));
    assert_eq!(tokens.get(2), Some("<|im_end|>"));
    assert!(gguf.get::<&str>("tokenizer.no.such.key").unwrap().is_none());
}

#[test]
fn tensors_are_where_and_what_they_should_be() {
    let gguf = model();
    assert_eq!(gguf.tensors().len(), 272);
    let of_type = |ty| gguf.tensors().filter(|tensor| tensor.ty == ty).count();
    // Seven matrices in each of 30 layers, 61 norms, and the embedding.
    assert_eq!(of_type(GgmlType::Q4_1), 210);
    assert_eq!(of_type(GgmlType::F32), 61);
    assert_eq!(of_type(GgmlType::Q8_0), 1);
    let k = gguf.tensor("blk.29.attn_k.weight").unwrap();
    assert_eq!(k.shape, [192, 576]);
    assert!(gguf.tensor("output.weight").is_none());
}

/// Weights of a trained model are small numbers: a wrong offset would not give them.
#[test]
fn weights_are_plausible() {
    let gguf = model();
    for tensor in gguf.tensors() {
        let mut weights = vec![0.0; tensor.shape.iter().product()];
        dequantize(tensor.ty, tensor.data, &mut weights);
        let rms = (weights.iter().map(|w| w * w).sum::<f32>() / weights.len() as f32).sqrt();
        assert!(rms > 1e-3 && rms < 20.0, "{}: {rms}", tensor.name);
    }
}
