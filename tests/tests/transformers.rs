//! The backends on the demo model, against `transformers` in float32 on the dequantised weights.

use serde::Deserialize;
use shoal_core::Role;
use shoal_engine::backend::Backend;
use shoal_engine::candle::CandleWeights;
use shoal_tests::accuracy::{log_softmax, top2};
use shoal_tests::backends::{candle, cpu, demo_gguf};
use shoal_tests::drive::{Sequence, append};
use shoal_tests::model::data;

#[derive(Deserialize)]
struct Greedy {
    prompt: String,
    prompt_ids: Vec<u32>,
    reference_ids: Vec<u32>,
    first_top2: [(usize, f64); 2],
}

/// Runs every answer, teacher-forced: the best tokens must be those of the reference wherever
/// their margin is at least `clear`, and the first log-probabilities within `error`, in nats.
/// Gives the share of all tokens that are those of the reference.
fn follow(backend: &mut dyn Backend, error: f64, clear: f64) -> f64 {
    let cases: Vec<Greedy> = serde_json::from_str(&data("greedy-f32.json")).expect("the cases");
    let vocab = backend.spec().vocab;
    let (mut same, mut all) = (0, 0);
    for case in &cases {
        let tokens = [&case.prompt_ids[..], &case.reference_ids].concat();
        let mut sequence = Sequence::scattered(backend);
        let logits = append(backend, &mut sequence, &tokens, Role::Prompt).expect("a step");
        let rows = logits.chunks(vocab).skip(case.prompt_ids.len() - 1);
        for (position, (row, &expected)) in rows.zip(&case.reference_ids).enumerate() {
            let row = log_softmax(row);
            for (token, logprob) in case.first_top2.iter().filter(|_| position == 0) {
                let off = (row[*token] - logprob).abs();
                assert!(off < error, "{:?}: {token} is off by {off}", case.prompt);
            }
            let [best, second] = top2(&row);
            assert!(
                best == expected as usize || row[best] - row[second] < clear,
                "{:?}: token {position} is {best}, not {expected}",
                case.prompt
            );
            same += usize::from(best == expected as usize);
            all += 1;
        }
    }
    let share = f64::from(same as u32) / f64::from(all as u32);
    println!(
        "{} agrees on {:.2} % of {all}",
        backend.name(),
        100.0 * share
    );
    share
}

#[test]
fn candle_follows() {
    // Below this margin the order of float additions decides.
    let share = follow(&mut candle(&demo_gguf(), CandleWeights::F32), 1e-3, 0.05);
    assert!(share > 0.99, "{share}");
}

#[test]
fn cpu_follows() {
    let share = follow(&mut cpu(&demo_gguf()), 0.35, 0.5);
    assert!(share > 0.95, "{share}");
}
