//! `shoal model inspect` as a process.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use shoal_gguf::{GgmlType, GgufWriter};
use support::shoal;

/// Writes a model of two tensors.
fn write(path: &Path) {
    let mut writer = GgufWriter::new();
    writer.metadata("general.architecture", "llama").unwrap();
    writer.metadata("general.name", "Tiny").unwrap();
    for (key, value) in [
        ("block_count", 2u32),
        ("embedding_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("context_length", 128),
    ] {
        writer.metadata(&format!("llama.{key}"), value).unwrap();
    }
    let weights: Vec<f32> = (0..64 * 32).map(|n| n as f32 / 100.0).collect();
    let quantized = shoal_gguf::quantize(GgmlType::Q8_0, &weights);
    writer
        .tensor("token_embd.weight", GgmlType::Q8_0, &[32, 64], quantized)
        .unwrap();
    let norm = shoal_gguf::quantize(GgmlType::F32, &weights[..64]);
    writer
        .tensor("output_norm.weight", GgmlType::F32, &[64], norm)
        .unwrap();
    std::fs::write(path, writer.to_bytes()).unwrap();
}

#[tokio::test]
async fn a_model_is_described() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    write(&path);
    let path = path.to_str().unwrap();
    let ran = shoal(
        &[
            "model",
            "inspect",
            path,
            "--json",
            "--tensors",
            "--metadata",
        ],
        "",
    )
    .await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let found: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(found["architecture"], "llama");
    assert_eq!(found["shape"]["head_width"], 16);
    assert_eq!(found["parameters"], 64 * 32 + 64);
    assert_eq!(found["quantization"]["Q8_0"]["bytes"], 64 * 34);
    assert_eq!(found["quantization"]["F32"]["tensors"], 1);
    // 2 (keys, values) x 2 bytes x 2 layers x 2 heads x 16.
    assert_eq!(found["memory"]["kv_bytes_per_token"], 256);
    assert_eq!(found["memory"]["kv_bytes_per_context"], 256 * 128);
    assert_eq!(found["metadata"]["general.name"], "Tiny");
    assert_eq!(found["tensors"][0]["shape"], serde_json::json!([32, 64]));

    let ran = shoal(&["model", "inspect", path, "--tensors"], "").await;
    assert!(ran.stdout.contains("token_embd.weight"), "{ran:?}");
    let ran = shoal(&["model", "inspect", path], "").await;
    assert!(!ran.stdout.contains("token_embd.weight"), "{ran:?}");
}

#[tokio::test]
async fn broken_files_are_errors_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    write(&whole);
    let bytes = std::fs::read(&whole).unwrap();
    let mut lying = bytes.clone();
    lying[8] = 0xff;
    lying[14] = 0xff;
    for (name, content) in [
        ("empty", &[][..]),
        ("text", b"not a model at all"),
        ("cut", &bytes[..bytes.len() / 2]),
        ("lying", &lying),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let ran = shoal(&["model", "inspect", path.to_str().unwrap()], "").await;
        assert_eq!(ran.code, Some(1), "{name}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{name}: {ran:?}");
        assert!(ran.stderr.contains(name), "{ran:?}");
    }
    let ran = shoal(&["model", "inspect", "/does/not/exist.gguf"], "").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("/does/not/exist.gguf"), "{ran:?}");
}
