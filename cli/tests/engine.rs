//! `shoal model random` and `shoal bench engine` as processes.

#![allow(clippy::unwrap_used)]

mod support;

use support::shoal;

#[tokio::test]
async fn a_random_model_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("random.gguf");
    let path = path.to_str().unwrap();
    let shape = [
        "--layers",
        "2",
        "--width",
        "256",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--ff",
        "512",
        "--vocab",
        "1000",
        "--context",
        "512",
        "--type",
        "q4_k",
    ];
    let ran = shoal(&[&["model", "random", path], &shape[..]].concat(), "").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");

    let measure = ["bench", "engine", path, "--time", "1ms", "--threads", "2"];
    let ran = shoal(&[&measure, &["--json"][..]].concat(), "").await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let cases = report["cases"].as_array().unwrap();
    let case = |name: &str| cases.iter().find(|case| case["name"] == name);
    // What the context holds, and no more.
    assert!(case("prefill 512").is_some() && case("prefill 2048").is_none());
    let parts = case("decode 8 x 256").unwrap()["parts"].as_array().unwrap();
    let attention = parts
        .iter()
        .find(|part| part["name"] == "attention")
        .unwrap();
    assert!(attention["ms"].as_f64().unwrap() > 0.0);
    assert!(attention["limit_percent"].as_f64().unwrap() > 0.0);

    let ran = shoal(&[&measure, &["--only", "decode 1 x 64"][..]].concat(), "").await;
    assert!(ran.stdout.contains("decode 1 x 64"), "{ran:?}");
    assert!(!ran.stdout.contains("prefill"), "{ran:?}");

    let ran = shoal(&[&measure, &["--only", "nothing"][..]].concat(), "").await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("no case"), "{ran:?}");
}
