//! A straight line through measured step times.

/// Least squares of `seconds = base + slope * rows`, with the weights of older steps fading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    /// What older steps still count when a new one comes.
    fade: f64,
    weight: f64,
    rows: f64,
    rows_squared: f64,
    seconds: f64,
    rows_seconds: f64,
}

impl Line {
    pub(crate) fn new(fade: f64) -> Self {
        Self {
            fade,
            weight: 0.0,
            rows: 0.0,
            rows_squared: 0.0,
            seconds: 0.0,
            rows_seconds: 0.0,
        }
    }

    /// Learns from one step.
    pub(crate) fn add(&mut self, rows: f64, seconds: f64) {
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.rows_squared, rows * rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_seconds, rows * seconds),
        ] {
            *sum = *sum * self.fade + value;
        }
    }

    /// Steps that count, each by what is left of its weight.
    pub(crate) fn weight(&self) -> f64 {
        self.weight
    }

    /// Means of the rows and of the seconds of a step; `None` before the first one.
    pub(crate) fn means(&self) -> Option<(f64, f64)> {
        (self.weight > 0.0).then(|| (self.rows / self.weight, self.seconds / self.weight))
    }

    /// Base and slope, once `least` is reached by the variance of the rows times the squared
    /// weight.
    pub(crate) fn fit(&self, least: f64) -> Option<(f64, f64)> {
        let spread = self.weight * self.rows_squared - self.rows * self.rows;
        if self.weight == 0.0 || spread < least {
            return None;
        }
        let covariance = self.weight * self.rows_seconds - self.rows * self.seconds;
        let slope = covariance / spread;
        Some(((self.seconds - slope * self.rows) / self.weight, slope))
    }
}
