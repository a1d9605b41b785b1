//! A straight line through measured step times.

/// Least squares of `seconds = base + slope * rows`, with the weights of older measurements
/// fading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    /// What older measurements still count when a new one of weight 1 comes.
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

    /// Learns from a measurement that counts as `weight` of them.
    pub(crate) fn add(&mut self, weight: f64, rows: f64, seconds: f64) {
        let fade = self.fade.powf(weight);
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.rows_squared, rows * rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_seconds, rows * seconds),
        ] {
            *sum = *sum * fade + weight * value;
        }
    }

    /// Measurements that count, each by what is left of its weight.
    pub(crate) fn weight(&self) -> f64 {
        self.weight
    }

    /// Means of the rows and of the seconds; `None` before the first measurement.
    pub(crate) fn means(&self) -> Option<(f64, f64)> {
        (self.weight > 0.0).then(|| (self.rows / self.weight, self.seconds / self.weight))
    }

    /// Base and slope, once `least` is reached by the variance of the rows times the squared
    /// weight.
    pub(crate) fn fit(&self, least: f64) -> Option<(f64, f64)> {
        let spread = self.spread();
        (self.weight > 0.0 && spread >= least).then(|| self.through_means(spread))
    }

    /// Base and slope by ridge regression: the slope is drawn to 0, by half where the variance
    /// of the rows is `variance`. `None` before the first measurement.
    pub(crate) fn shrunk_fit(&self, variance: f64) -> Option<(f64, f64)> {
        let spread = self.spread() + variance * self.weight * self.weight;
        (self.weight > 0.0).then(|| self.through_means(spread))
    }

    fn spread(&self) -> f64 {
        self.weight * self.rows_squared - self.rows * self.rows
    }

    fn through_means(&self, spread: f64) -> (f64, f64) {
        let covariance = self.weight * self.rows_seconds - self.rows * self.seconds;
        let slope = covariance / spread;
        ((self.seconds - slope * self.rows) / self.weight, slope)
    }
}
