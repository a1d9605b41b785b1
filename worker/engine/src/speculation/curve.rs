//! What a step costs, by its decoding sequences and the draft rows beside them.

use crate::line::Line;

/// Numbers of draft rows that steps have: the curve is measured at these and nowhere else.
pub(crate) const EDGES: [usize; 21] = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 24, 31, 40, 48, 62, 80, 93, 124,
];
/// Sequences of the cells: exact up to 8, then up to 10, 12, 16, 20, 24, 32, 48, 64, and more.
const DECODES: [usize; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64];
/// Share of a new step in a cell that has seen many.
const SLOWEST: f64 = 1.0 / 24.0;
/// Steps that the line through all cells counts as in each of them.
const PRIOR: f64 = 1.0;
/// A step so much longer than its cell's is an accident of the machine.
const ACCIDENT: f64 = 2.0;
/// Cost of a draft row, as a share of a step of one sequence, before anything is measured. Low,
/// so that it gets measured.
const FIRST_GUESS: f64 = 0.05;
/// What older steps still count in the line when a new one comes.
const FADE: f64 = 0.995;

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    seconds: f64,
    steps: f64,
}

/// Step times, measured.
#[derive(Clone, Debug)]
pub(crate) struct StepCurve {
    cells: Box<[[Cell; EDGES.len()]; DECODES.len() + 1]>,
    /// Through all cells.
    line: Line,
}

/// The step times of one number of decoding sequences, never falling with the rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fit {
    /// By index of [`EDGES`].
    pub(crate) seconds: [f64; EDGES.len()],
}

impl Default for StepCurve {
    fn default() -> Self {
        Self {
            cells: Box::new([[Cell::default(); EDGES.len()]; DECODES.len() + 1]),
            line: Line::new(FADE),
        }
    }
}

fn bucket(decodes: usize) -> usize {
    DECODES.iter().take_while(|&&most| decodes > most).count()
}

impl StepCurve {
    /// Learns from a step of `decodes` sequences and `drafts` draft rows, and nothing else.
    pub(crate) fn add(&mut self, decodes: usize, drafts: usize, seconds: f64) {
        let Ok(edge) = EDGES.binary_search(&drafts) else {
            return;
        };
        let cell = &mut self.cells[bucket(decodes)][edge];
        let sound = if cell.steps > 4.0 {
            seconds.min(ACCIDENT * cell.seconds)
        } else {
            seconds
        };
        cell.steps += 1.0;
        cell.seconds += (sound - cell.seconds) * (1.0 / cell.steps).max(SLOWEST);
        self.line.add(1.0, (decodes + drafts) as f64, sound);
    }

    /// The curve of so many sequences; `None` before the first step of that kind.
    pub(crate) fn fit(&self, decodes: usize) -> Option<Fit> {
        let cells = &self.cells[bucket(decodes)];
        let known = cells.iter().position(|cell| cell.steps > 0.0)?;
        let (anchor, rows) = (cells[known].seconds, EDGES[known] as f64);
        let slope = match self.line.fit(self.line.weight()) {
            Some((_, slope)) => slope.max(0.0),
            None => FIRST_GUESS * anchor / decodes as f64,
        };
        let mut fit = Fit {
            seconds: [0.0; EDGES.len()],
        };
        let mut weights = [PRIOR; EDGES.len()];
        for (i, cell) in cells.iter().enumerate() {
            // The line's slope from the nearest measured cell below; the first one downwards.
            let below = cells[..=i].iter().rposition(|cell| cell.steps > 0.0);
            let guess = match below {
                Some(below) => cells[below].seconds + slope * (EDGES[i] - EDGES[below]) as f64,
                None => (anchor - slope * (rows - EDGES[i] as f64)).max(anchor * 0.1),
            };
            let steps = cell.steps.min(1.0 / SLOWEST);
            weights[i] += steps;
            fit.seconds[i] = (cell.seconds * steps + guess * PRIOR) / weights[i];
        }
        pool_violators(&mut fit.seconds, &weights);
        Some(fit)
    }
}

/// Isotonic regression: the nearest values that never fall (pool adjacent violators, Barlow et
/// al. 1972).
fn pool_violators(values: &mut [f64], weights: &[f64]) {
    // Start, mean and weight of each level run.
    let mut runs: Vec<(usize, f64, f64)> = Vec::with_capacity(values.len());
    for (i, (&value, &weight)) in values.iter().zip(weights).enumerate() {
        let mut run = (i, value, weight);
        while let Some(before) = runs.pop_if(|before| before.1 > run.1) {
            let weight = before.2 + run.2;
            let mean = (before.1 * before.2 + run.1 * run.2) / weight;
            run = (before.0, mean, weight);
        }
        runs.push(run);
    }
    let mut end = values.len();
    for (start, mean, _) in runs.into_iter().rev() {
        values[start..end].fill(mean);
        end = start;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_is_what_was_measured() {
        let mut curve = StepCurve::default();
        assert!(curve.fit(1).is_none());
        let cost = |rows: usize| 0.010 + 0.001 * rows as f64;
        for _ in 0..50 {
            for drafts in [0, 1, 4, 8] {
                curve.add(2, drafts, cost(2 + drafts));
            }
        }
        let fit = curve.fit(2).unwrap();
        for (edge, seconds) in EDGES.iter().zip(fit.seconds) {
            assert!((seconds - cost(2 + edge)).abs() < 2e-4, "{edge}: {seconds}");
        }
        // Another number of sequences is not known, but its slope is.
        curve.add(5, 0, 0.020);
        let fit = curve.fit(5).unwrap();
        assert!((fit.seconds[4] - 0.024).abs() < 5e-4);
    }

    #[test]
    fn accidents_count_little_and_changes_are_followed() {
        let mut curve = StepCurve::default();
        for i in 0..200 {
            curve.add(1, 0, if i % 20 == 19 { 0.5 } else { 0.01 });
        }
        let seconds = curve.fit(1).unwrap().seconds[0];
        assert!((0.0095..0.0115).contains(&seconds), "{seconds}");
        for _ in 0..200 {
            curve.add(1, 0, 0.02);
        }
        assert!(curve.fit(1).unwrap().seconds[0] > 0.0195);
    }

    #[test]
    fn numbers_between_the_edges_are_not_measured() {
        let mut curve = StepCurve::default();
        curve.add(1, 9, 1.0);
        assert!(curve.fit(1).is_none());
    }

    #[test]
    fn violators_are_pooled() {
        let mut values = [1.0, 3.0, 2.0, 2.0, 5.0, 4.0];
        pool_violators(&mut values, &[1.0, 1.0, 1.0, 2.0, 1.0, 3.0]);
        assert_eq!(values, [1.0, 2.25, 2.25, 2.25, 4.25, 4.25]);
    }
}
