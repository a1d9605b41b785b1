//! Passes over a whole row of logits.

use shoal_core::TokenId;

use super::SampleError;

/// Logits per block, and lanes of a vector loop over one.
pub(super) const BLOCK: usize = 64;
pub(super) const LANES: usize = 16;

/// Writes the largest logit of each block of [`BLOCK`], and gives the largest of all.
pub(super) fn block_maxima(logits: &[f32], maxima: &mut Vec<f32>) -> Result<f32, SampleError> {
    maxima.clear();
    // x - x is 0 unless x is NaN or infinite. Minus infinity is a masked token.
    let mut bad = false;
    let mut best = f32::NEG_INFINITY;
    for block in logits.chunks(BLOCK) {
        let (lanes, rest) = block.as_chunks::<LANES>();
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut nan = [0u32; LANES];
        for lane in lanes {
            for i in 0..LANES {
                max[i] = if lane[i] > max[i] { lane[i] } else { max[i] };
                nan[i] |= u32::from(lane[i].is_nan());
            }
        }
        let mut top = max
            .iter()
            .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        bad |= nan.iter().any(|&n| n != 0);
        for &x in rest {
            top = if x > top { x } else { top };
            bad |= x.is_nan();
        }
        maxima.push(top);
        best = if top > best { top } else { best };
    }
    if bad || best == f32::INFINITY {
        return Err(SampleError::NotFinite);
    }
    if best == f32::NEG_INFINITY {
        return Err(SampleError::NothingAllowed);
    }
    Ok(best)
}

/// The lowest token whose logit is `max`, the largest of all.
pub(super) fn first_of(logits: &[f32], maxima: &[f32], max: f32) -> TokenId {
    let block = maxima.iter().position(|&m| m == max).unwrap_or(0);
    let start = block * BLOCK;
    let within = logits[start..].iter().position(|&x| x == max).unwrap_or(0);
    (start + within) as TokenId
}
