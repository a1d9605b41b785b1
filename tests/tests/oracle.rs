//! The oracle itself: candle on dequantised weights, against `transformers` in float32.

use serde::Deserialize;
use shoal_core::Role;
use shoal_engine::candle::CandleWeights;
use shoal_tests::accuracy::{log_softmax, top2};
use shoal_tests::backends::{candle, demo_gguf};
use shoal_tests::drive::{Sequence, append};
use shoal_tests::model::data;

#[derive(Deserialize)]
struct Greedy {
    prompt: String,
    prompt_ids: Vec<u32>,
    reference_ids: Vec<u32>,
    first_top2: [(usize, f64); 2],
}

/// Below this margin of the two best tokens, in nats, the order of float additions decides.
const CLEAR_MARGIN: f64 = 0.05;

#[test]
fn candle_follows_transformers() {
    let cases: Vec<Greedy> = serde_json::from_str(&data("greedy-f32.json")).unwrap();
    assert!(!cases.is_empty());
    let mut candle = candle(&demo_gguf(), CandleWeights::F32);
    let vocab = shoal_engine::backend::Backend::spec(&candle).vocab;
    for case in cases {
        let Greedy {
            prompt,
            prompt_ids,
            reference_ids,
            first_top2,
        } = case;
        let tokens = [&prompt_ids[..], &reference_ids].concat();
        let mut sequence = Sequence::scattered(&candle);
        let logits = append(&mut candle, &mut sequence, &tokens, Role::Prompt).unwrap();
        let mut rows = logits
            .chunks(vocab)
            .skip(prompt_ids.len() - 1)
            .map(log_softmax);
        for (position, &expected) in reference_ids.iter().enumerate() {
            let row = rows.next().unwrap();
            if position == 0 {
                for (token, logprob) in first_top2 {
                    let error = (row[token] - logprob).abs();
                    assert!(error < 1e-3, "{prompt:?}: token {token} is off by {error}");
                }
            }
            let [best, second] = top2(&row);
            let clear = row[best] - row[second] >= CLEAR_MARGIN;
            assert!(
                best == expected as usize || !clear,
                "{prompt:?}: token {position} is {best}, not {expected}"
            );
        }
    }
}
