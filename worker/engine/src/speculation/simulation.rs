//! The controller against itself switched off and against fixed lengths, on measured step
//! times and texts that copy in runs.

use shoal_core::Namespace;

use super::Drafter;
use super::admission::best_rows;
use super::curve::{EDGES, StepCurve};
use super::hazard::{Hazards, Kind, Reliability};

/// Step times of the demo model on two threads of a Zen 4, in milliseconds: rows, time. The last
/// two go on as the ones before.
const MEASURED: [(f64, f64); 7] = [
    (1.0, 2.94),
    (4.0, 5.05),
    (8.0, 9.24),
    (16.0, 18.41),
    (32.0, 36.49),
    (64.0, 73.0),
    (128.0, 146.0),
];
/// A machine whose rows are nearly free up to 16, and one whose rows are all alike.
const MEMORY_BOUND: [(f64, f64); 4] = [(1.0, 10.0), (16.0, 11.0), (32.0, 20.0), (128.0, 75.0)];
const COMPUTE_BOUND: [(f64, f64); 2] = [(1.0, 5.0), (128.0, 640.0)];

/// Output tokens of each sequence.
const TOKENS: usize = 1500;

fn seconds(curve: &[(f64, f64)], rows: usize) -> f64 {
    let rows = rows as f64;
    let at = curve
        .partition_point(|&(n, _)| n < rows)
        .clamp(1, curve.len() - 1);
    let ((n0, t0), (n1, t1)) = (curve[at - 1], curve[at]);
    (t0 + (t1 - t0) * (rows - n0) / (n1 - n0)) * 1e-3
}

/// A small generator of uniform numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Geometric, of the given mean, at least 1.
    fn length(&mut self, mean: f64) -> usize {
        1 + (self.uniform().ln() / (1.0 - 1.0 / mean).ln()) as usize
    }
}

/// A text as it will be: of every token, how far a copy runs on from it, and after how many
/// tokens of the run a drafter finds it.
#[derive(Clone, Copy, Debug)]
struct Style {
    run: f64,
    gap: f64,
    lock: usize,
}

/// Free chat, quoting answers, templates, copies.
const STYLES: [Style; 4] = [
    Style {
        run: 6.0,
        gap: 8.0,
        lock: 2,
    },
    Style {
        run: 15.0,
        gap: 6.0,
        lock: 3,
    },
    Style {
        run: 30.0,
        gap: 4.0,
        lock: 3,
    },
    Style {
        run: 80.0,
        gap: 3.0,
        lock: 3,
    },
];

/// Each token's place in its run and the tokens of the run after it; `None` in a gap.
fn text(style: Style, random: &mut Random) -> Vec<Option<(usize, usize)>> {
    let mut text = Vec::new();
    while text.len() < TOKENS {
        let run = random.length(style.run);
        text.extend((0..run).map(|i| Some((i, run - i - 1))));
        text.extend((0..random.length(style.gap)).map(|_| None));
    }
    text.truncate(TOKENS);
    text
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Arm {
    Fixed(usize),
    Auto,
}

struct Simulated {
    text: Vec<Option<(usize, usize)>>,
    at: usize,
    reliability: Reliability,
}

impl Simulated {
    /// Length of the match that leads to a draft of 31 tokens, and how many of those are right.
    /// A copy that ends is found to have ended by its wrong guess alone.
    fn draft(&self, style: Style) -> Option<(usize, usize)> {
        let last = self.at.checked_sub(1)?;
        let (place, left) = self.text[last]?;
        (place + 1 >= style.lock).then_some((place + 1, left))
    }
}

/// Longest draft; a whole number of edges.
const MOST: usize = 31;

struct Simulation<'a> {
    arm: Arm,
    costs: &'a [(f64, f64)],
    style: Style,
    tenant: Namespace,
    hazards: Hazards,
    curve: StepCurve,
    /// Of the texts, the same for every arm.
    random: Random,
    noise: Random,
}

fn kind(length: usize) -> Kind {
    Kind {
        drafter: Drafter::Session,
        length,
    }
}

impl Simulation<'_> {
    /// Draft rows of each sequence.
    fn plan(&self, all: &[Simulated]) -> Vec<usize> {
        let drafts = all.iter().map(|sequence| sequence.draft(self.style));
        if let Arm::Fixed(rows) = self.arm {
            return drafts.map(|draft| draft.map_or(0, |_| rows)).collect();
        }
        let mut counts = vec![0; all.len()];
        let mut candidates = Vec::new();
        for (index, draft) in drafts.enumerate() {
            let Some((length, _)) = draft else { continue };
            let mut survival = 1.0f32;
            for position in 0..MOST {
                let chance = self.hazards.of(&self.tenant).at(kind(length), position);
                survival *= all[index].reliability.adjust(chance);
                candidates.push((survival, index));
            }
        }
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        if let Some(fit) = self.curve.fit(all.len()) {
            let survivals = candidates.iter().map(|c| f64::from(c.0));
            let choice = best_rows(&fit, all.len(), 0, 127, survivals);
            for &(_, index) in &candidates[..choice.rows] {
                counts[index] += 1;
            }
        }
        counts
    }

    /// Runs a step; gives its seconds.
    fn step(&mut self, all: &mut Vec<Simulated>) -> f64 {
        let counts = self.plan(all);
        let rows: usize = counts.iter().sum();
        let time = seconds(self.costs, all.len() + rows);
        let measured = time * (0.95 + 0.1 * self.noise.uniform());
        self.curve.add(all.len(), rows, measured);
        for (sequence, count) in all.iter_mut().zip(counts) {
            let mut made = 1;
            if let Some((length, left)) = sequence.draft(self.style) {
                made += left.min(count);
                // The token after the right ones is judged as well.
                let outcomes = (0..made.min(MOST)).map(|position| position < left);
                for (position, right) in outcomes.clone().enumerate() {
                    let chance = self.hazards.of(&self.tenant).at(kind(length), position);
                    sequence.reliability.learn(chance, right);
                }
                self.hazards.learn(&self.tenant, kind(length), outcomes);
            }
            sequence.at += made;
        }
        all.retain(|sequence| sequence.at < sequence.text.len());
        time
    }

    /// Seconds for so many texts.
    fn run(&mut self, sequences: usize) -> f64 {
        let mut all: Vec<Simulated> = (0..sequences)
            .map(|_| Simulated {
                text: text(self.style, &mut self.random),
                at: 0,
                reliability: Reliability::default(),
            })
            .collect();
        let mut total = 0.0;
        while !all.is_empty() {
            total += self.step(&mut all);
        }
        total
    }
}

/// Seconds that an arm takes for `sequences` texts, after as many that taught it.
fn run(arm: Arm, costs: &[(f64, f64)], style: Style, sequences: usize) -> f64 {
    let mut simulation = Simulation {
        arm,
        costs,
        style,
        tenant: Namespace::new("t", ""),
        hazards: Hazards::default(),
        curve: StepCurve::default(),
        random: Random(sequences as u64),
        noise: Random(99),
    };
    simulation.run(sequences);
    simulation.run(sequences)
}

#[test]
fn the_controller_is_as_good_as_the_best_fixed_length() {
    let mut worse = Vec::new();
    // The best length of two or four copies is luck, too: a text has some 350 steps, and the
    // curve that is flat up to 16 rows rewards lengths between the edges.
    for (costs, least) in [
        (&MEASURED[..], 0.98),
        (&MEMORY_BOUND, 0.95),
        (&COMPUTE_BOUND, 0.97),
    ] {
        for style in STYLES {
            for sequences in [1, 2, 4, 8, 16, 32] {
                let arm = |arm| run(arm, costs, style, sequences);
                let fixed = [0, 1, 2, 3, 4, 6, 8, 12, 15, 24, 31];
                let best = fixed.map(|rows| arm(Arm::Fixed(rows)));
                let best = best.into_iter().fold(f64::INFINITY, f64::min);
                let ratio = best / arm(Arm::Auto);
                if ratio < least {
                    let run = style.run;
                    worse.push(format!("{ratio:.3} {run} {sequences} {costs:?}"));
                }
            }
        }
    }
    assert!(worse.is_empty(), "of the best: {worse:#?}");
}

/// The edges reach as far as one sequence's draft does.
#[test]
fn a_whole_draft_can_be_measured() {
    assert!(EDGES.iter().any(|&edge| edge + 1 == super::MAX_DRAFT));
}
