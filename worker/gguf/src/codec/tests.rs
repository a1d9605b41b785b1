//! Decoding against candle's, encoding against error bounds.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::*;

/// Whole blocks of any bytes; every second one with scales that are not extreme.
fn any_blocks(ty: GgmlType) -> impl Strategy<Value = Vec<u8>> {
    let blocks = if ty.is_quantized() { 4 } else { 64 };
    proptest::collection::vec(any::<u8>(), blocks * ty.block_bytes())
}

fn candle_type(ty: GgmlType) -> GgmlDType {
    match ty {
        GgmlType::F32 => GgmlDType::F32,
        GgmlType::F16 => GgmlDType::F16,
        GgmlType::BF16 => GgmlDType::BF16,
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
    }
}

fn candle_dequantize(ty: GgmlType, data: &[u8], len: usize) -> Vec<f32> {
    let storage = QStorage::from_data(data.into(), &Device::Cpu, candle_type(ty)).unwrap();
    let tensor = QTensor::new(storage, len).unwrap();
    let tensor: Tensor = tensor.dequantize(&Device::Cpu).unwrap();
    tensor.to_vec1().unwrap()
}

fn dequantized(ty: GgmlType, data: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; data.len() / ty.block_bytes() * ty.block_len()];
    dequantize(ty, data, &mut out);
    out
}

/// Which NaN comes of NaN scales is nobody's business.
fn bits(values: &[f32]) -> Vec<u32> {
    let bits = |v: &f32| if v.is_nan() { u32::MAX } else { v.to_bits() };
    values.iter().map(bits).collect()
}

fn check_against_candle(ty: GgmlType, data: &[u8]) {
    let ours = dequantized(ty, data);
    let theirs = candle_dequantize(ty, data, ours.len());
    assert_eq!(bits(&ours), bits(&theirs), "{ty}");
}

proptest! {
    /// Random bytes: any quants, and scales that are subnormal, negative, infinite, NaN.
    #[test]
    fn dequantizes_as_candle_does((ty, data) in any_type().prop_flat_map(|ty| (Just(ty), any_blocks(ty)))) {
        check_against_candle(ty, &data);
    }

    /// Blocks that quantisation makes, which random bytes hardly ever resemble.
    #[test]
    fn quantized_blocks_dequantize_as_candle_does(ty in any_type(), weights in any_weights()) {
        check_against_candle(ty, &quantize(ty, &weights));
    }

    #[test]
    fn a_round_trip_errs_by_half_a_step(ty in any_type(), weights in any_weights()) {
        let back = dequantized(ty, &quantize(ty, &weights));
        let span = ty.block_len().max(1);
        for (weights, back) in weights.chunks(span).zip(back.chunks(span)) {
            let bound = error_bound(ty, weights);
            for (w, b) in weights.iter().zip(back) {
                prop_assert!((w - b).abs() <= bound, "{ty}: {w} became {b}, bound {bound}");
            }
        }
    }

    /// Packers build on groups; they must say the same as the floats.
    #[test]
    fn groups_hold_the_weights(
        (ty, data) in any_type().prop_filter("quantised", |ty| ty.is_quantized())
            .prop_flat_map(|ty| (Just(ty), any_blocks(ty)))
    ) {
        let zero = f32::from(zero_point(ty).unwrap());
        let floats = dequantized(ty, &data);
        let mut seen = 0;
        unpack(ty, &data, |index, group| {
            assert_eq!(index, seen);
            seen += 1;
            for (i, float) in floats[GROUP * index..][..GROUP].iter().enumerate() {
                let weight = group.scales[i / 16] * (f32::from(group.quants[i]) - zero) + group.min;
                assert!(weight == *float || weight.is_nan() && float.is_nan());
            }
        });
        prop_assert_eq!(GROUP * seen, floats.len());
    }
}

fn any_type() -> impl Strategy<Value = GgmlType> {
    proptest::sample::select(GgmlType::all().collect::<Vec<_>>())
}

/// Two super-blocks: around 0 or to one side of it, of any usual scale, now and then constant.
fn any_weights() -> impl Strategy<Value = Vec<f32>> {
    let unit = proptest::collection::vec(prop_oneof![9 => -1.0f32..1.0, 1 => Just(0.0)], 512);
    let shift = prop_oneof![3 => Just(0.0), 1 => -2.0f32..2.0];
    let spread = prop_oneof![9 => Just(1.0), 1 => Just(0.0)];
    (unit, shift, spread, -6i32..6).prop_map(|(mut weights, shift, spread, exponent)| {
        for w in &mut weights {
            *w = (*w * spread + shift) * 4f32.powi(exponent);
        }
        weights
    })
}

/// Half a step of the block's quants, and what rounding the scales to their own precision adds.
fn error_bound(ty: GgmlType, block: &[f32]) -> f32 {
    let (low, high) = block::range(block);
    let most = low.abs().max(high.abs());
    // f16 keeps 11 bits, and nothing below its subnormals.
    let f16_rounding = most / 1024.0 + 32.0 * 2f32.powi(-24);
    let half_step = match ty {
        GgmlType::F32 => return 0.0,
        GgmlType::F16 => return most / 2048.0 + 2f32.powi(-25),
        GgmlType::BF16 => return most / 256.0,
        // The step is `most / 8` or `/ 16`, and one end may lie a step beyond the last quant.
        GgmlType::Q4_0 => most / 8.0,
        GgmlType::Q5_0 => most / 16.0,
        GgmlType::Q8_0 => most / 254.0,
        GgmlType::Q4_1 => (high - low) / 30.0,
        GgmlType::Q5_1 => (high - low) / 62.0,
        // The factors round up by at most 1/63 or 1/127 of the largest; ranges include 0.
        GgmlType::Q4_K => (high.max(0.0) - low.min(0.0)) / 30.0 * (1.0 + 3.0 / 63.0),
        GgmlType::Q5_K => (high.max(0.0) - low.min(0.0)) / 62.0 * (1.0 + 3.0 / 63.0),
        GgmlType::Q6_K => most / 62.0 * (1.0 + 2.0 / 127.0),
    };
    half_step + f16_rounding
}

#[test]
fn zero_weights_stay_zero() {
    for ty in GgmlType::all() {
        let back = dequantized(ty, &quantize(ty, &[0.0; 256]));
        assert!(back.iter().all(|&w| w == 0.0), "{ty}");
    }
}

#[test]
#[should_panic(expected = "no whole number of Q4_1 blocks")]
fn half_a_block_is_refused() {
    unpack(GgmlType::Q4_1, &[0; 30], |_, _| ());
}
