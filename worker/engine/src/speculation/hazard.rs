//! How often drafts have been right: by tenant, drafter, length of the match and position.

use std::collections::HashMap;

use shoal_core::Namespace;

use super::Drafter;

/// What older outcomes still count when a new one comes.
const FADE: f32 = 0.995;
/// Outcomes that the cluster of all tenants counts as in a tenant's own cell.
const PRIOR: f32 = 6.0;
/// Tenants that are told apart.
const MOST_TENANTS: usize = 256;
/// No guess is surer than this.
const SUREST: f32 = 0.995;

/// Lengths of a match: up to 2, 3, 5, 8, 16, 32 tokens, and longer.
const LENGTHS: usize = 7;
/// Positions in a draft: 0, 1–2, 3–6, 7–14, and later.
pub(super) const POSITIONS: usize = 5;

fn length_bucket(length: usize) -> usize {
    const ENDS: [usize; LENGTHS - 1] = [2, 3, 5, 8, 16, 32];
    ENDS.iter().take_while(|&&end| length > end).count()
}

/// The bucket of a position in a draft.
pub(super) fn position_bucket(position: usize) -> usize {
    ((position + 1).ilog2() as usize).min(POSITIONS - 1)
}

/// Fading counts of one kind of guess.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    tried: f32,
    right: f32,
}

impl Cell {
    fn add(&mut self, right: bool) {
        self.tried = self.tried * FADE + 1.0;
        self.right = self.right * FADE + f32::from(u8::from(right));
    }

    fn rate(self, prior: f32) -> f32 {
        (self.right + PRIOR * prior) / (self.tried + PRIOR)
    }
}

type Cells = [[[Cell; POSITIONS]; LENGTHS]; Drafter::COUNT];

#[derive(Clone, Debug, Default)]
struct Table {
    cells: Box<Cells>,
    used: u64,
}

/// The chance that a draft token is right, given that those before it were.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hazards {
    all: Table,
    tenants: HashMap<Namespace, Table>,
    clock: u64,
}

/// The kind of a draft: what its chances are looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) drafter: Drafter,
    /// Tokens that led to it.
    pub(crate) length: usize,
}

/// See [`Hazards::of`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chances<'a> {
    all: &'a Table,
    own: Option<&'a Table>,
}

impl Chances<'_> {
    /// The chance of the token at a position.
    pub(crate) fn at(self, kind: Kind, position: usize) -> f32 {
        let place = (
            kind.drafter as usize,
            length_bucket(kind.length),
            position_bucket(position),
        );
        let cell = |table: &Table| table.cells[place.0][place.1][place.2];
        let all = cell(self.all).rate(first_guess(place.1, position));
        self.own
            .map_or(all, |table| cell(table).rate(all))
            .min(SUREST)
    }
}

impl Hazards {
    /// What is known of a tenant.
    pub(crate) fn of(&self, tenant: &Namespace) -> Chances<'_> {
        Chances {
            all: &self.all,
            own: self.tenants.get(tenant),
        }
    }

    /// Learns from a draft, given what came: every position up to the first wrong one counts.
    pub(crate) fn learn(
        &mut self,
        tenant: &Namespace,
        kind: Kind,
        outcomes: impl Iterator<Item = bool>,
    ) {
        self.clock += 1;
        if !self.tenants.contains_key(tenant) {
            self.make_room();
        }
        let own = self.tenants.entry(*tenant).or_default();
        own.used = self.clock;
        let (drafter, length) = (kind.drafter as usize, length_bucket(kind.length));
        for (position, right) in outcomes.enumerate() {
            let position = position_bucket(position);
            for table in [&mut *own, &mut self.all] {
                table.cells[drafter][length][position].add(right);
            }
        }
    }

    fn make_room(&mut self) {
        if self.tenants.len() < MOST_TENANTS {
            return;
        }
        let oldest = self.tenants.iter().min_by_key(|(_, table)| table.used);
        if let Some(oldest) = oldest.map(|(tenant, _)| *tenant) {
            self.tenants.remove(&oldest);
        }
    }
}

/// The chance before anything is known: longer matches are better, and so is what follows a
/// token that was right.
fn first_guess(length: usize, position: usize) -> f32 {
    const BY_LENGTH: [f32; LENGTHS] = [0.25, 0.35, 0.5, 0.6, 0.75, 0.85, 0.9];
    BY_LENGTH[length].max(if position == 0 { 0.0 } else { 0.7 })
}

/// How often a sequence's drafts fail beside what was expected of them: some texts repeat more
/// than others of the same tenant, and hot sampling breaks every copy.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reliability {
    expected: f32,
    failed: f32,
}

impl Reliability {
    /// What an older guess still counts when a new one comes.
    const FADE: f32 = 0.97;
    /// Failures that count from the start as having been expected.
    const PRIOR: f32 = 1.0;

    /// A chance, as it is for this sequence: its complement grows with the failures.
    pub(crate) fn adjust(self, chance: f32) -> f32 {
        let factor = (self.failed + Self::PRIOR) / (self.expected + Self::PRIOR);
        (1.0 - (1.0 - chance) * factor).clamp(0.01, SUREST)
    }

    /// Learns from one guess of the given chance, unadjusted.
    pub(crate) fn learn(&mut self, chance: f32, right: bool) {
        self.expected = self.expected * Self::FADE + (1.0 - chance);
        self.failed = self.failed * Self::FADE + f32::from(u8::from(!right));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        drafter: Drafter::Session,
        length: 4,
    };

    #[test]
    fn buckets_are_ordered_and_whole() {
        assert_eq!(
            [0, 1, 2, 3, 6, 7, 14, 15, 31].map(position_bucket),
            [0, 1, 1, 2, 2, 3, 3, 4, 4]
        );
        assert_eq!(
            [1, 2, 3, 4, 6, 9, 32, 64].map(length_bucket),
            [0, 0, 1, 2, 3, 4, 5, 6]
        );
    }

    #[test]
    fn chances_follow_the_outcomes_of_their_tenant() {
        let mut hazards = Hazards::default();
        let (good, bad) = (Namespace::new("good", ""), Namespace::new("bad", ""));
        for _ in 0..400 {
            hazards.learn(&good, KIND, [true, true].into_iter());
            hazards.learn(&bad, KIND, [false].into_iter());
        }
        assert!(hazards.of(&good).at(KIND, 0) > 0.95);
        assert!(hazards.of(&bad).at(KIND, 0) < 0.05);
        // A stranger has the chances of all.
        let stranger = hazards.of(&Namespace::new("new", "")).at(KIND, 0);
        assert!((0.3..0.7).contains(&stranger), "{stranger}");
        assert!(hazards.of(&good).at(KIND, 0) <= SUREST);
    }

    #[test]
    fn tenants_are_bounded() {
        let mut hazards = Hazards::default();
        for i in 0..2 * MOST_TENANTS {
            let tenant = Namespace::new(&i.to_string(), "");
            hazards.learn(&tenant, KIND, [true].into_iter());
        }
        assert_eq!(hazards.tenants.len(), MOST_TENANTS);
    }

    #[test]
    fn reliability_finds_its_level() {
        let mut text = Reliability::default();
        assert!((text.adjust(0.8) - 0.8).abs() < 1e-6);
        for _ in 0..200 {
            text.learn(0.8, false);
        }
        assert!(text.adjust(0.8) < 0.15);
        for i in 0..400 {
            text.learn(0.5, i % 2 == 0);
        }
        assert!((text.adjust(0.5) - 0.5).abs() < 0.1);
        for _ in 0..400 {
            text.learn(0.8, true);
        }
        assert!(text.adjust(0.8) > 0.95);
    }
}
