//! What was measured, as a table and as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use shoal_kernels::Isa;

/// What the machine can do in a second, and what it takes its threads to meet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes read from memory.
    pub(super) read: f64,
    /// Operations on bytes, where there is an instruction for them.
    pub(super) dots: Option<f64>,
    /// Operations on f32.
    pub(super) fmas: Option<f64>,
    /// A phase without work.
    pub(super) phase: Duration,
}

/// What must be done at least.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    /// Bytes to read from memory.
    pub(super) bytes: usize,
    /// Operations on bytes.
    pub(super) dots: usize,
    /// Operations on f32.
    pub(super) fmas: usize,
}

/// A part of a step.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    pub(super) work: Work,
}

/// A case.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) name: String,
    pub(super) rows: usize,
    /// The median.
    pub(super) seconds: f64,
    pub(super) least: f64,
    /// Share of the time in which there was no core for a thread that was ready to run.
    pub(super) waited: f64,
    pub(super) parts: Vec<Part>,
}

impl Limits {
    /// Between these and others.
    pub(super) fn mean(&self, other: &Self) -> Self {
        let of = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| (a + b) / 2.0);
        Self {
            read: (self.read + other.read) / 2.0,
            dots: of(self.dots, other.dots),
            fmas: of(self.fmas, other.fmas),
            phase: (self.phase + other.phase) / 2,
        }
    }

    /// The least seconds for some work: on reading, on dots and on multiply-adds.
    fn seconds(&self, work: Work) -> [f64; 3] {
        let of = |amount: usize, rate: Option<f64>| rate.map_or(0.0, |rate| amount as f64 / rate);
        [
            of(work.bytes, Some(self.read)),
            of(work.dots, self.dots),
            of(work.fmas, self.fmas),
        ]
    }

    fn floor(&self, work: Work) -> f64 {
        self.seconds(work).into_iter().fold(0.0, f64::max)
    }
}

/// The whole run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    isa: String,
    threads: usize,
    load_ms: f64,
    cases: Vec<CaseReport>,
}

/// A case: medians.
#[derive(Clone, Debug, Serialize)]
struct CaseReport {
    name: String,
    ms: f64,
    least_ms: f64,
    tok_s: f64,
    /// The time that the machine would need for reading alone, as a share of the time taken.
    read_percent: f64,
    dot_percent: f64,
    fma_percent: f64,
    /// The sum over the parts of what the dearest of the three would need.
    limit_percent: f64,
    /// The share of the threads' time that went to other processes.
    wait_percent: f64,
    /// The limits, as they were found before the case and after it.
    read_gb_s: f64,
    dot_tops: Option<f64>,
    fma_tflops: Option<f64>,
    phase_us: f64,
    parts: Vec<PartReport>,
}

#[derive(Clone, Debug, Serialize)]
struct PartReport {
    name: &'static str,
    ms: f64,
    limit_percent: f64,
}

impl Report {
    pub(super) fn new(
        isa: Isa,
        threads: usize,
        load: Duration,
        cases: Vec<(Measured, Limits)>,
    ) -> Self {
        let case = |(case, limits): (Measured, Limits)| {
            let parts = case.parts.iter();
            let mut sums = [0.0; 3];
            for part in parts.clone() {
                let seconds = limits.seconds(part.work);
                sums = std::array::from_fn(|i| sums[i] + seconds[i]);
            }
            let [read, dot, fma] = sums.map(|sum| 100.0 * sum / case.seconds);
            let floor: f64 = parts.clone().map(|part| limits.floor(part.work)).sum();
            CaseReport {
                ms: case.seconds * 1e3,
                least_ms: case.least * 1e3,
                tok_s: case.rows as f64 / case.seconds,
                read_percent: read,
                dot_percent: dot,
                fma_percent: fma,
                limit_percent: 100.0 * floor / case.seconds,
                wait_percent: 100.0 * case.waited,
                read_gb_s: limits.read / 1e9,
                dot_tops: limits.dots.map(|rate| rate / 1e12),
                fma_tflops: limits.fmas.map(|rate| rate / 1e12),
                phase_us: limits.phase.as_secs_f64() * 1e6,
                parts: parts
                    .map(|part| PartReport {
                        name: part.name,
                        ms: part.seconds * 1e3,
                        limit_percent: 100.0 * limits.floor(part.work) / part.seconds,
                    })
                    .collect(),
                name: case.name,
            }
        };
        Self {
            isa: format!("{isa:?}"),
            threads,
            load_ms: load.as_secs_f64() * 1e3,
            cases: cases.into_iter().map(case).collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tera = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{rate:.2}"));
        writeln!(
            f,
            "{}, {} threads; loaded in {:.0} ms\n",
            self.isa, self.threads, self.load_ms,
        )?;
        let width = self.cases.iter().map(|c| c.name.len()).max().unwrap_or(0);
        writeln!(
            f,
            "{:width$} {:>9} {:>9} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {:>5} {:>6} {:>8}",
            "",
            "ms",
            "least",
            "tok/s",
            "read%",
            "dots%",
            "fma%",
            "limit%",
            "wait%",
            "GB/s",
            "TOPS",
            "TFLOPS",
            "phase us"
        )?;
        for c in &self.cases {
            writeln!(
                f,
                "{:width$} {:>9.3} {:>9.3} {:>7.0} {:>6.0} {:>6.0} {:>6.0} {:>6.0} {:>6.1} {:>7.1} {:>5} {:>6} {:>8.2}",
                c.name,
                c.ms,
                c.least_ms,
                c.tok_s,
                c.read_percent,
                c.dot_percent,
                c.fma_percent,
                c.limit_percent,
                c.wait_percent,
                c.read_gb_s,
                tera(c.dot_tops),
                tera(c.fma_tflops),
                c.phase_us
            )?;
        }
        writeln!(f, "\nms of each part (and % of what limits it)")?;
        write!(f, "{:width$}", "")?;
        for part in self.cases.first().iter().flat_map(|c| &c.parts) {
            write!(f, " {:>13}", part.name)?;
        }
        writeln!(f)?;
        for c in &self.cases {
            write!(f, "{:width$}", c.name)?;
            for part in &c.parts {
                match part.limit_percent {
                    percent if percent > 0.0 => write!(f, " {:>8.3} {percent:>3.0}%", part.ms)?,
                    _ => write!(f, " {:>8.3}     ", part.ms)?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_limit_that_binds() {
        let limits = Limits {
            read: 100.0,
            dots: Some(1000.0),
            fmas: None,
            phase: Duration::ZERO,
        };
        let part = |bytes, dots| Part {
            name: "part",
            seconds: 2.0,
            work: Work {
                bytes,
                dots,
                fmas: 7,
            },
        };
        let measured = Measured {
            name: "case".to_owned(),
            rows: 8,
            seconds: 4.0,
            least: 3.0,
            waited: 0.5,
            parts: vec![part(100, 500), part(0, 2000)],
        };
        let report = Report::new(Isa::Scalar, 2, Duration::ZERO, vec![(measured, limits)]);
        let case = &report.cases[0];
        assert_eq!(
            case.parts
                .iter()
                .map(|p| p.limit_percent)
                .collect::<Vec<_>>(),
            [50.0, 100.0]
        );
        assert_eq!(
            (case.tok_s, case.read_percent, case.dot_percent),
            (2.0, 25.0, 62.5)
        );
        assert_eq!((case.fma_percent, case.limit_percent), (0.0, 75.0));
        assert_eq!(case.wait_percent, 50.0);
        assert!(report.to_string().contains("100%"));
    }
}
