use proptest::prelude::*;
use shoal_core::{NoiseKey, Sampling};
use shoal_kernels::Isa;
use shoal_kernels::logits::{BLOCK, block_maxima, exp_neg, total_weight};

use super::race::inverse;
use super::*;

/// Logits from a small generator, roughly normal with this deviation.
fn logits(len: usize, seed: u64, deviation: f32) -> Vec<f32> {
    let key = |i: u32| NoiseKey::new(seed, i, 0);
    (0..len as u32)
        .map(|token| {
            let sum: f32 = (0..4).map(|i| key(i).uniform(token)).sum();
            (sum - 2.0) * 1.7 * deviation
        })
        .collect()
}

fn draw_with(logits: &mut [f32], sampling: &Sampling, position: u32) -> TokenId {
    let draw = Draw {
        sampling,
        counts: &Counts::default(),
        masked: &[],
        position,
    };
    let token = Sampler::default().draw(logits, &[], draw).unwrap();
    let mut maxima = vec![0.0; logits.len().div_ceil(BLOCK)];
    block_maxima(Isa::detect(), logits, &mut maxima);
    let with_maxima = Sampler::default().draw(logits, &maxima, draw);
    assert_eq!(with_maxima, Ok(token));
    token
}

/// Tokens left by top-k, top-p and min-p with their weights, by the definition: sort, cut,
/// cut, cut.
fn reference_kept(logits: &[f32], sampling: &Sampling) -> Vec<(TokenId, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = inverse(sampling.temperature);
    let mut all: Vec<(TokenId, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    let mut kept: Vec<(TokenId, f32)> = all
        .into_iter()
        .map(|(token, logit)| (token, exp_neg((logit - max) * scale)))
        .collect();
    let mut total = total_weight(Isa::detect(), logits, max, scale);
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k as usize);
        total = kept.iter().map(|&(_, w)| f64::from(w)).sum();
    }
    if sampling.top_p < 1.0 {
        let mut sum = 0.0;
        let reached = kept.iter().position(|&(_, w)| {
            sum += f64::from(w);
            sum >= f64::from(sampling.top_p) * total
        });
        kept.truncate(reached.map_or(kept.len(), |last| last + 1));
    }
    kept.retain(|&(_, w)| w >= sampling.min_p && w > 0.0);
    kept
}

/// The race over all that is kept, with every logarithm taken.
fn reference_draw(logits: &[f32], sampling: &Sampling, position: u32) -> TokenId {
    let key = NoiseKey::new(sampling.seed, sampling.choice, position);
    reference_kept(logits, sampling)
        .into_iter()
        .map(|(token, w)| (key.exponential(token) / w, token))
        .min_by(|a, b| a.partial_cmp(b).unwrap())
        .unwrap()
        .1
}

fn shapes() -> impl Strategy<Value = Sampling> {
    (
        prop_oneof![
            Just(1.0f32),
            Just(1e-6),
            Just(f32::MIN_POSITIVE),
            0.1f32..3.0
        ],
        prop_oneof![Just(1.0f32), 0.01f32..1.0, Just(1e-9)],
        prop_oneof![Just(0u32), Just(1), 1u32..100, Just(100_000)],
        prop_oneof![Just(0.0f32), 0.0f32..0.3, Just(1.0)],
        any::<u64>(),
    )
        .prop_map(|(temperature, top_p, top_k, min_p, seed)| Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            seed,
            ..Sampling::default()
        })
}

#[test]
fn no_penalty_makes_an_infinity() {
    let counts_of = |sampling: &Sampling| Counts::new(sampling, &[1, 2], &[2]);
    for repetition_penalty in [f32::MIN_POSITIVE, 1e-40] {
        let sampling = Sampling {
            repetition_penalty,
            frequency_penalty: 2.0,
            ..Sampling::default()
        };
        let draw = Draw {
            sampling: &sampling,
            counts: &counts_of(&sampling),
            masked: &[],
            position: 0,
        };
        let mut row = vec![0.5; 80];
        let token = Sampler::default().draw(&mut row, &[], draw).unwrap();
        assert!([1, 2].contains(&token), "{token}");
        assert_eq!(row, vec![0.5; 80]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Pruning, blocks and partial sorts change no draw.
    #[test]
    fn draws_are_those_of_the_definition(
        sampling in shapes(),
        len in prop_oneof![1usize..200, 1000usize..5000],
        deviation in prop_oneof![Just(0.0f32), Just(0.3), Just(3.0), Just(30.0)],
        ties in any::<bool>(),
    ) {
        let mut row = logits(len, sampling.seed ^ 1, deviation);
        if ties {
            row.iter_mut().for_each(|x| *x = x.round());
        }
        for position in 0..4 {
            let expected = reference_draw(&row, &sampling, position);
            prop_assert_eq!(draw_with(&mut row, &sampling, position), expected);
        }
    }

    /// Bias, penalties and mask against a direct transcription, and no trace of them left.
    #[test]
    fn penalties_are_those_of_the_definition(
        prompt in proptest::collection::vec(0u32..80, 1..60),
        output in proptest::collection::vec(0u32..80, 0..60),
        repetition in prop_oneof![Just(1.0f32), 0.5f32..2.0],
        presence in prop_oneof![Just(0.0f32), -2.0f32..2.0],
        frequency in prop_oneof![Just(0.0f32), -2.0f32..2.0],
        bias in proptest::collection::btree_map(0u32..80, -5.0f32..5.0, 0..10),
        masked in proptest::collection::vec(0u32..80, 0..5),
        seed in any::<u64>(),
    ) {
        let sampling = Sampling {
            temperature: 0.0,
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            logit_bias: bias.into_iter().collect(),
            ..Sampling::default()
        };
        let mut row = logits(80, seed, 2.0);
        let before = row.clone();
        let mut expected = row.clone();
        for &(token, b) in &sampling.logit_bias {
            expected[token as usize] += b;
        }
        for token in 0..80u32 {
            let x = &mut expected[token as usize];
            let count = output.iter().filter(|&&t| t == token).count();
            if count > 0 || prompt.contains(&token) {
                *x = if *x > 0.0 { *x / repetition } else { *x * repetition };
            }
            if count > 0 {
                *x = *x - presence - frequency * count as f32;
            }
            if masked.contains(&token) {
                *x = f32::NEG_INFINITY;
            }
        }
        // As after a resume in the middle of the output.
        let (early, late) = output.split_at(output.len() / 2);
        let mut counts = Counts::new(&sampling, &prompt, early);
        late.iter().for_each(|&token| counts.push(token));
        let draw = Draw { sampling: &sampling, counts: &counts, masked: &masked, position: 0 };
        let token = Sampler::default().draw(&mut row, &[], draw).unwrap();
        let best = (0..80).rev().max_by(|&a, &b| expected[a].total_cmp(&expected[b])).unwrap();
        prop_assert_eq!(token as usize, best);
        prop_assert_eq!(row, before);
    }

    #[test]
    fn logprobs_are_those_of_f64(len in 1usize..3000, seed in any::<u64>(), top in 0u32..=20) {
        let row = logits(len, seed, 4.0);
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let exact = |token: usize| f64::from(row[token]) - sum.ln();
        let token = (seed % len as u64) as u32;
        let got = Sampler::default().logprob(&row, &[], token, top).unwrap();
        prop_assert!((f64::from(got.logprob.unwrap()) - exact(token as usize)).abs() < 2e-6);
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.truncate(top as usize);
        let ids: Vec<usize> = got.top.iter().map(|&(t, _)| t as usize).collect();
        prop_assert_eq!(ids, order);
        for (t, logprob) in got.top {
            prop_assert!((f64::from(logprob) - exact(t as usize)).abs() < 2e-6);
        }
    }
}

/// Chi-square of many draws against probabilities computed in f64.
fn chi_square(row: &mut [f32], sampling: &Sampling, kept: &[u32], draws: u32) -> (f64, usize) {
    let t = f64::from(sampling.temperature);
    let weight = |token: u32| (f64::from(row[token as usize]) / t).exp();
    let total: f64 = kept.iter().map(|&token| weight(token)).sum();
    let expected: Vec<f64> = kept
        .iter()
        .map(|&token| weight(token) / total * f64::from(draws))
        .collect();
    let mut counts = vec![0u32; row.len()];
    for position in 0..draws {
        counts[draw_with(row, sampling, position) as usize] += 1;
    }
    let inside: u32 = kept.iter().map(|&token| counts[token as usize]).sum();
    assert_eq!(inside, draws, "a token outside the kept set was drawn");
    // Rare tokens share a cell, so that every cell expects enough.
    let (mut chi, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (&token, &e) in kept.iter().zip(&expected) {
        let c = f64::from(counts[token as usize]);
        if e < 10.0 {
            rare = (rare.0 + c, rare.1 + e);
        } else {
            chi += (c - e) * (c - e) / e;
            cells += 1;
        }
    }
    if rare.1 > 0.0 {
        chi += (rare.0 - rare.1) * (rare.0 - rare.1) / rare.1;
        cells += 1;
    }
    (chi, cells - 1)
}

#[test]
fn draws_follow_the_distribution() {
    let plain = Sampling {
        seed: 77,
        ..Sampling::default()
    };
    let shapes = [
        plain.clone(),
        Sampling {
            temperature: 0.5,
            ..plain.clone()
        },
        Sampling {
            top_k: 12,
            ..plain.clone()
        },
        Sampling {
            top_p: 0.8,
            ..plain.clone()
        },
        Sampling {
            min_p: 0.1,
            ..plain.clone()
        },
        Sampling {
            temperature: 1.5,
            top_k: 40,
            top_p: 0.7,
            min_p: 0.02,
            ..plain
        },
    ];
    for sampling in shapes {
        let mut row = logits(300, 5, 2.0);
        let kept: Vec<u32> = reference_kept(&row, &sampling)
            .into_iter()
            .map(|(token, _)| token)
            .collect();
        let (chi, freedom) = chi_square(&mut row, &sampling, &kept, 40_000);
        // Wilson and Hilferty: 3.7 deviations, p about 1e-4.
        let f = freedom as f64;
        let limit = f * (1.0 - 2.0 / (9.0 * f) + 3.7 * (2.0 / (9.0 * f)).sqrt()).powi(3);
        assert!(chi < limit, "{sampling:?}: {chi} of {limit}, {freedom}");
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let greedy = Sampling {
        temperature: 0.0,
        ..Sampling::default()
    };
    let mut row = vec![-1.0; 1000];
    for token in [999, 700, 331] {
        row[token] = 2.5;
        assert_eq!(draw_with(&mut row, &greedy, 0), token as u32);
    }
    let mut zeros = vec![0.0, -0.0, 0.0];
    assert_eq!(draw_with(&mut zeros, &greedy, 0), 0);
}

#[test]
fn ties_at_the_border_keep_the_lowest() {
    let mut row = vec![1.0; 500];
    let top_k = Sampling {
        top_k: 3,
        ..Sampling::default()
    };
    assert!((0..200).all(|position| draw_with(&mut row, &top_k, position) < 3));
    let top_p = Sampling {
        top_p: 0.0199,
        ..Sampling::default()
    };
    assert!((0..200).all(|position| draw_with(&mut row, &top_p, position) < 10));
    // Equal tokens are all at the best one's share.
    let min_p = Sampling {
        min_p: 1.0,
        ..Sampling::default()
    };
    assert!((0..200).any(|position| draw_with(&mut row, &min_p, position) > 400));
}

#[test]
fn unusable_logits_are_errors() {
    for sampling in [
        Sampling::default(),
        Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        Sampling {
            top_p: 0.5,
            ..Sampling::default()
        },
    ] {
        let mut sampler = Sampler::default();
        let counts = Counts::default();
        let draw = |masked| Draw {
            sampling: &sampling,
            counts: &counts,
            masked,
            position: 0,
        };
        for at in [0, 63, 64, 99] {
            let mut row = logits(100, 1, 1.0);
            row[at] = f32::NAN;
            assert_eq!(
                sampler.draw(&mut row, &[], draw(&[])),
                Err(SampleError::NotFinite)
            );
            row[at] = f32::INFINITY;
            assert_eq!(
                sampler.draw(&mut row, &[], draw(&[])),
                Err(SampleError::NotFinite)
            );
            row[at] = f32::NEG_INFINITY;
            assert!(
                sampler
                    .draw(&mut row, &[], draw(&[]))
                    .is_ok_and(|t| t != at as u32)
            );
        }
        let mut row = vec![0.0; 2];
        let error = sampler.draw(&mut row, &[], draw(&[0, 1]));
        assert_eq!(error, Err(SampleError::NothingAllowed));
        assert_eq!(row, [0.0, 0.0]);
    }
}
