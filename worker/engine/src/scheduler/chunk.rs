//! How many prompt rows fit beside decoding sequences: a line fitted to measured step times.

use std::time::Duration;

use crate::{line::Line, metrics::StepStats};

/// What an older step still counts when a new one comes.
const FADE: f64 = 0.98;
/// Steps measured before the fit is believed.
const WARM_UP: f64 = 8.0;
/// Prompt rows that every step may add, whatever they cost: prompts must come to an end.
const LEAST: usize = 32;
/// Seconds of a row before any was measured: slow for a small model, fast for a large one.
const PRIOR_ROW: f64 = 0.02;
/// Seconds beyond which no prediction goes.
const LONGEST: f64 = 600.0;

/// What recent steps took, by their rows.
#[derive(Clone, Debug)]
pub(super) struct StepTimeModel(Line);

impl Default for StepTimeModel {
    fn default() -> Self {
        Self(Line::new(FADE))
    }
}

impl StepTimeModel {
    /// Learns from one step.
    pub(super) fn add(&mut self, stats: &StepStats) {
        let rows = (stats.prefill_rows + stats.decode_rows) as f64;
        self.0.add(rows, stats.time.as_secs_f64());
    }

    /// Base and slope, once steps of different sizes have been seen.
    pub(super) fn fit(&self) -> Option<(f64, f64)> {
        if self.0.weight() < WARM_UP {
            return None;
        }
        let (base, slope) = self.0.fit(1.0)?;
        (slope > 0.0).then_some((base.max(0.0), slope))
    }

    /// What a step of `rows` rows is predicted to take.
    pub(super) fn expected(&self, rows: usize) -> Duration {
        let rows = rows as f64;
        let seconds = match (self.fit(), self.0.means()) {
            (Some((base, slope)), _) => base + slope * rows,
            (None, Some((usual, seconds))) => seconds * (rows / usual).max(1.0),
            (None, None) => PRIOR_ROW * rows,
        };
        Duration::from_secs_f64(seconds.clamp(0.0, LONGEST))
    }

    /// Prompt rows beside `decodes` decode rows for a step within `target`; at most `most`, and
    /// that many while nothing is known.
    pub(super) fn chunk(&self, decodes: usize, most: usize, target: Duration) -> usize {
        let Some((base, slope)) = self.fit() else {
            return most;
        };
        let rows = (target.as_secs_f64() - base) / slope - decodes as f64;
        (rows.max(0.0) as usize).clamp(LEAST.min(most), most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trained(base_us: u64, row_us: u64) -> StepTimeModel {
        let mut model = StepTimeModel::default();
        for i in 0..60 {
            let prefill_rows = (i % 4) * 50;
            model.add(&StepStats {
                time: Duration::from_micros(base_us + row_us * (prefill_rows as u64 + 4)),
                prefill_rows,
                decode_rows: 4,
                output_tokens: 4,
            });
        }
        model
    }

    #[test]
    fn chunk_ends_at_the_target() {
        let target = Duration::from_millis(20);
        assert_eq!(trained(2000, 100).chunk(4, 1000, target).abs_diff(176), 0);
        assert_eq!(trained(2000, 1).chunk(4, 256, target), 256);
        // Too slow for any row: prompts go on at the least pace.
        assert_eq!(trained(30_000, 100).chunk(4, 256, target), LEAST);
    }

    #[test]
    fn a_step_is_predicted_by_the_line_or_by_the_mean() {
        let millis = |model: &StepTimeModel, rows| model.expected(rows).as_secs_f64() * 1e3;
        assert!((millis(&trained(2000, 100), 200) - 22.0).abs() < 0.1);
        let mut model = StepTimeModel::default();
        assert_eq!(millis(&model, 100), 2000.0);
        for _ in 0..20 {
            model.add(&StepStats {
                time: Duration::from_millis(10),
                decode_rows: 4,
                ..StepStats::default()
            });
        }
        assert!((millis(&model, 2) - 10.0).abs() < 0.1);
        assert!((millis(&model, 8) - 20.0).abs() < 0.1);
    }

    #[test]
    fn nothing_known_means_the_most() {
        let target = Duration::from_millis(1);
        assert_eq!(StepTimeModel::default().chunk(4, 256, target), 256);
    }
}
