//! Percentiles.

/// The `p`-th percentile, in milliseconds, of times in seconds; 0 without any.
pub(crate) fn percentile_ms(seconds: &mut [f64], p: f64) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    let at = (seconds.len().saturating_sub(1) as f64 * p / 100.0).round() as usize;
    seconds.get(at).map_or(0.0, |s| s * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_known_series() {
        let mut seconds: Vec<f64> = (0..=100).rev().map(|i| f64::from(i) / 1e3).collect();
        assert_eq!(percentile_ms(&mut seconds, 50.0), 50.0);
        assert_eq!(percentile_ms(&mut seconds, 99.0), 99.0);
        assert_eq!(percentile_ms(&mut [], 99.0), 0.0);
    }
}
