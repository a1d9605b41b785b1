//! How many prompt rows fit beside decoding sequences, by measured step times.
//!
//! Decode rows and prompt rows have prices of their own: a line through the steps without prompt
//! rows, and what prompt rows added to the others, which grows with the tokens they attend to.

use std::time::Duration;

use crate::{line::Line, metrics::StepStats};

/// What an older step without prompt rows still counts when a new one comes.
const FADE: f64 = 0.98;
/// The same of an older prompt row: about a thousand are remembered.
const FADE_PROMPT: f64 = 0.999;
/// Steps measured before their line is believed.
const WARM_UP: f64 = 8.0;
/// Prompt rows measured before others are told of their price: that of the first few has in it
/// what a step takes anyway.
const WARM_PROMPT: f64 = 256.0;
/// Share of the target that is planned for, as times waver.
const AIM: f64 = 0.9;
/// Prompt rows that every step may add, whatever they cost: prompts must come to an end.
const LEAST: usize = 32;
/// Draft rows that time is kept for beside prompts, and so many for each of the last step's.
const DRAFT_ROWS: usize = 4;
const MORE_DRAFTS: usize = 2;
/// Depths must differ by about so many tokens before they are seen to matter.
const DEPTHS: f64 = 128.0;
/// Seconds of a row before any was measured: slow for a small model, fast for a large one.
const PRIOR_ROW: f64 = 0.02;
/// Seconds beyond which no prediction goes.
const LONGEST: f64 = 600.0;

/// What recent steps took, by their rows.
#[derive(Clone, Debug)]
pub(super) struct StepTimeModel {
    /// Seconds by rows, of steps without prompt rows.
    decode: Line,
    /// Seconds that a prompt row added, by the position it is at.
    prompt: Line,
}

impl Default for StepTimeModel {
    fn default() -> Self {
        Self {
            decode: Line::new(FADE),
            prompt: Line::new(FADE_PROMPT),
        }
    }
}

impl StepTimeModel {
    /// Learns from one step.
    pub(super) fn add(&mut self, stats: &StepStats) {
        let seconds = stats.time.as_secs_f64();
        if stats.prefill_rows == 0 {
            self.decode.add(1.0, stats.decode_rows as f64, seconds);
            return;
        }
        let rows = stats.prefill_rows as f64;
        let added = (seconds - self.decodes(stats.decode_rows)).max(0.0);
        let depth = stats.prefill_depth as f64 / rows;
        self.prompt.add(rows, depth, added / rows);
    }

    /// What a step of n decode rows takes as base and slope, once some were measured; the slope
    /// is 0 while they have been of one size.
    pub(super) fn decode_step(&self) -> Option<(f64, f64)> {
        let usual = || self.decode.means().map(|(_, seconds)| (seconds, 0.0));
        self.fit().or_else(usual)
    }

    /// Base and slope of the steps without prompt rows, once they have been of different sizes.
    fn fit(&self) -> Option<(f64, f64)> {
        if self.decode.weight() < WARM_UP {
            return None;
        }
        let (base, slope) = self.decode.fit(1.0)?;
        (slope > 0.0).then_some((base.max(0.0), slope))
    }

    /// Seconds of a prompt row at the depths of late, once enough were measured.
    pub(super) fn settled_prompt_row(&self) -> Option<f64> {
        let settled = self.prompt.weight() >= WARM_PROMPT;
        self.prompt_row().filter(|_| settled)
    }

    /// Seconds of a prompt row at the depths of late.
    fn prompt_row(&self) -> Option<f64> {
        self.prompt.means().map(|(_, seconds)| seconds)
    }

    /// Seconds of a draft row beside prompts: it costs what it does alone, and no less than they.
    pub(super) fn draft_row(&self) -> Option<f64> {
        let alone = self.fit().map_or(0.0, |(_, slope)| slope);
        self.prompt_row().map(|row| row.max(alone))
    }

    /// What a step is predicted to take: so many decode rows, and so many prompt rows whose
    /// positions add up to `prefill_depth`.
    pub(super) fn expected(
        &self,
        decode_rows: usize,
        prefill_rows: usize,
        prefill_depth: u64,
    ) -> Duration {
        let prompt = match self.prices() {
            Some((row, deeper)) => row * prefill_rows as f64 + deeper * prefill_depth as f64,
            None => PRIOR_ROW * prefill_rows as f64,
        };
        let decode = match self.decode.means() {
            Some(_) => self.decodes(decode_rows),
            None => PRIOR_ROW * decode_rows as f64,
        };
        Duration::from_secs_f64((decode + prompt).clamp(0.0, LONGEST))
    }

    /// What prompt rows may add to a step of `decodes` decode rows that is to end within
    /// `target`. Up to half of the time is kept for drafts, by how many the last step had.
    pub(super) fn allowance(&self, decodes: usize, drafted: usize, target: Duration) -> Allowance {
        let (Some(prices), Some(draft_row)) = (self.prices(), self.draft_row()) else {
            return Allowance {
                least: LEAST,
                ..Allowance::NONE
            };
        };
        let left = (AIM * target.as_secs_f64() - self.decodes(decodes)).max(0.0);
        let drafts = (DRAFT_ROWS + MORE_DRAFTS * drafted) as f64 * draft_row;
        let drafts = drafts.min(left / 2.0);
        Allowance {
            seconds: left - drafts,
            drafts,
            least: LEAST,
            prices,
            draft_row,
        }
    }

    /// Seconds of a step of so many decode rows alone; 0 before any was measured.
    fn decodes(&self, rows: usize) -> f64 {
        let rows = rows as f64;
        match (self.fit(), self.decode.means()) {
            (Some((base, slope)), _) => base + slope * rows,
            (None, Some((usual, seconds))) => seconds * (rows / usual).max(1.0),
            (None, None) => 0.0,
        }
    }

    /// Seconds of a prompt row at position 0, and what each position adds.
    fn prices(&self) -> Option<(f64, f64)> {
        let (row, deeper) = self.prompt.shrunk_fit(DEPTHS * DEPTHS)?;
        Some(match deeper > 0.0 && row > 0.0 {
            true => (row, deeper),
            false => (self.prompt_row()?, 0.0),
        })
    }
}

/// The prompt rows and draft rows that a step has room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    seconds: f64,
    /// Seconds that only drafts may have.
    drafts: f64,
    /// Rows that are given whatever they cost.
    least: usize,
    /// As [`StepTimeModel::prices`].
    prices: (f64, f64),
    /// Seconds of a draft row.
    draft_row: f64,
}

impl Allowance {
    const NONE: Self = Self {
        seconds: 0.0,
        drafts: 0.0,
        least: 0,
        prices: (0.0, 0.0),
        draft_row: 0.0,
    };

    /// Room for any number: nobody waits for the step.
    pub(super) const ANY: Self = Self {
        seconds: f64::MAX,
        least: usize::MAX,
        ..Self::NONE
    };

    /// Rows that fit from position `depth` on: the `n` with `n · row + (n · depth + n² / 2) ·
    /// deeper = seconds`.
    pub(super) fn rows(&self, depth: usize) -> usize {
        let (row, deeper) = self.prices;
        let first = row + deeper * depth as f64;
        let root = (first * first + 2.0 * deeper * self.seconds).sqrt();
        // A ratio that is not a number, of nothing to nothing, casts to no rows.
        let rows = 2.0 * self.seconds / (first + root);
        (rows as usize).max(self.least)
    }

    /// Takes off what `rows` rows from position `depth` on cost.
    pub(super) fn take(&mut self, rows: usize, depth: usize) {
        let (row, deeper) = self.prices;
        let n = rows as f64;
        let cost = n * row + n * (depth as f64 + n / 2.0) * deeper;
        self.seconds = (self.seconds - cost).max(0.0);
        self.least = self.least.saturating_sub(rows);
    }

    /// Draft rows that fit into what prompts have left.
    pub(super) fn draft_rows(&self) -> usize {
        ((self.seconds + self.drafts) / self.draft_row) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(micros: f64, decode_rows: usize, prefill_rows: usize, depth: usize) -> StepStats {
        StepStats {
            time: Duration::from_secs_f64(micros / 1e6),
            prefill_rows,
            prefill_depth: (prefill_rows * depth) as u64,
            decode_rows,
            output_tokens: decode_rows,
        }
    }

    /// Of a machine where a prompt row costs `row_us`, and as much again at depth 1,000.
    fn trained(base_us: f64, row_us: f64) -> StepTimeModel {
        let mut model = StepTimeModel::default();
        for i in 0..60 {
            let decodes = 4 + i % 3;
            let alone = base_us + decodes as f64 * 10.0;
            model.add(&step(alone, decodes, 0, 0));
            let depth = i * 7 % 60 * 30;
            let rows = 50.0 * row_us * (1.0 + depth as f64 / 1000.0);
            model.add(&step(alone + rows, decodes, 50, depth));
        }
        model
    }

    #[test]
    fn rows_end_at_the_target() {
        let target = Duration::from_millis(20);
        let rows = |model: &StepTimeModel, depth| model.allowance(6, 0, target).rows(depth);
        let model = trained(2000.0, 100.0);
        // 15.2 ms without the drafts'; halfway through, the rows are 70 deep.
        assert!(rows(&model, 0).abs_diff(142) <= 8, "{}", rows(&model, 0));
        assert!(
            rows(&model, 2000).abs_diff(50) <= 3,
            "{}",
            rows(&model, 2000)
        );
        // Too slow for any row: prompts go on at the least pace.
        assert_eq!(rows(&trained(30_000.0, 100.0), 0), LEAST);
    }

    #[test]
    fn decoding_alone_teaches_nothing_about_prompts() {
        let target = Duration::from_millis(20);
        let mut model = trained(2000.0, 100.0);
        let before = model.allowance(4, 0, target).rows(500);
        for i in 0..500 {
            let decodes = 2 + i % 5;
            model.add(&step(2000.0 + decodes as f64 * 10.0, decodes, 0, 0));
        }
        assert!(model.allowance(4, 0, target).rows(500).abs_diff(before) <= 1);
    }

    #[test]
    fn short_prompts_say_nothing_about_depth() {
        let mut model = StepTimeModel::default();
        for i in 0..100 {
            // Deeper rows happened to take longer, or less long, by much for their depth.
            let micros = 5000.0 + f64::from(i % 7 - 3) * 300.0;
            model.add(&step(micros, 0, 50, 30 + (i % 7) as usize));
        }
        let deep = model.allowance(0, 0, Duration::from_millis(20)).rows(2000);
        assert!(deep.abs_diff(200) < 50, "{deep}");
    }

    #[test]
    fn a_price_of_few_rows_is_not_told() {
        let mut model = StepTimeModel::default();
        model.add(&step(15_000.0, 0, 2, 0));
        assert_eq!(model.settled_prompt_row(), None);
        model.add(&step(15_000.0, 1, 0, 0));
        for _ in 0..10 {
            model.add(&step(15_000.0 + 32.0 * 500.0, 0, 32, 0));
        }
        let row = model.settled_prompt_row().unwrap_or_default() * 1e6;
        assert!((row - 500.0).abs() < 60.0, "{row}");
    }

    #[test]
    fn an_allowance_is_spent() {
        let mut left = trained(2000.0, 100.0).allowance(6, 0, Duration::from_millis(20));
        let first = left.rows(0);
        left.take(first / 2, 0);
        assert!(left.rows(0) > first / 3 && left.rows(0) < first * 2 / 3);
        left.take(first, 0);
        assert_eq!(left.rows(0), 0);
    }

    #[test]
    fn drafts_keep_their_place_beside_prompts() {
        let model = trained(2000.0, 100.0);
        let left = |drafted| {
            let mut left = model.allowance(6, drafted, Duration::from_millis(20));
            left.take(left.rows(0), 0);
            left.draft_rows()
        };
        assert!(left(0).abs_diff(4) <= 1, "{}", left(0));
        assert!(left(10).abs_diff(24) <= 1, "{}", left(10));
        // At most half of the 16 ms, at the 190 us of a row at depth 900.
        assert!(left(200).abs_diff(42) <= 3, "{}", left(200));
    }

    #[test]
    fn nothing_known_means_the_least() {
        let target = Duration::from_millis(1);
        let mut left = StepTimeModel::default().allowance(4, 0, target);
        assert_eq!(left.rows(0), LEAST);
        assert_eq!(left.draft_rows(), 0);
        left.take(20, 0);
        assert_eq!(left.rows(0), LEAST - 20);
        assert_eq!(Allowance::ANY.rows(100), usize::MAX);
    }

    #[test]
    fn a_step_is_predicted_by_what_is_known() {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let model = trained(2000.0, 100.0);
        let deep = millis(model.expected(4, 100, 100 * 1000));
        assert!((deep - 22.04).abs() < 1.0, "{deep}");
        let mut model = StepTimeModel::default();
        assert_eq!(millis(model.expected(60, 40, 0)), 2000.0);
        for _ in 0..20 {
            model.add(&step(10_000.0, 4, 0, 0));
        }
        assert!((millis(model.expected(2, 0, 0)) - 10.0).abs() < 0.1);
        assert!((millis(model.expected(8, 0, 0)) - 20.0).abs() < 0.1);
    }
}
