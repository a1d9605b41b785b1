//! Passes over a whole row of logits.

use shoal_core::TokenId;
use shoal_kernels::logits::BLOCK;

use super::SampleError;

/// The largest of the maxima of a row's blocks.
pub(super) fn greatest(maxima: &[f32]) -> Result<f32, SampleError> {
    let mut best = f32::NEG_INFINITY;
    let mut bad = false;
    for &max in maxima {
        bad |= max.is_nan();
        best = if max > best { max } else { best };
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
