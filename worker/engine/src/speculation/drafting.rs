//! One sequence's drafters, what they propose for the next step, and what became of it.

use shoal_core::{Namespace, Speculation, TokenId};
use shoal_draft::{SessionIndex, SharedCorpus};

use super::hazard::{Chances, Hazards, Kind, Reliability};
use super::pushed::{Landing, PushedDraft};
use super::{Drafter, MAX_DRAFT};

/// A draft of one drafter; empty where it has none.
#[derive(Clone, Debug, Default)]
struct Proposal {
    tokens: Vec<TokenId>,
    /// Tokens that led to it.
    length: usize,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Drafting {
    mode: Speculation,
    /// Made with the first proposal.
    index: Option<SessionIndex>,
    corpora: Vec<(Drafter, SharedCorpus)>,
    pushed: Option<PushedDraft>,
    /// By drafter.
    proposals: [Proposal; Drafter::COUNT],
    /// Whose proposal the draft rows are of.
    chosen: Drafter,
    /// Draft rows of the step being planned.
    rows: usize,
    reliability: Reliability,
    drafted: u32,
    accepted: u32,
}

/// The text that is drafted for, and the bounds of a draft.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    /// Prompt, then output.
    pub(crate) tokens: &'a [TokenId],
    pub(crate) prompt: usize,
    /// Most tokens of a draft.
    pub(crate) most: usize,
    pub(crate) vocab: usize,
    pub(crate) stops: &'a [TokenId],
}

impl Drafting {
    pub(crate) fn new(mode: Speculation, corpora: Vec<(Drafter, SharedCorpus)>) -> Self {
        Self {
            mode,
            index: None,
            corpora,
            pushed: None,
            proposals: Default::default(),
            chosen: Drafter::Session,
            rows: 0,
            reliability: Reliability::default(),
            drafted: 0,
            accepted: 0,
        }
    }

    /// How it is drafted for.
    pub(crate) fn mode(&self) -> Speculation {
        self.mode
    }

    /// Takes a draft that was made elsewhere; the newest wins.
    pub(crate) fn push(&mut self, draft: PushedDraft) {
        if self.mode != Speculation::Off {
            self.pushed = Some(draft);
        }
    }

    /// Forgets the draft of the last step.
    pub(crate) fn reset(&mut self) {
        self.rows = 0;
        for proposal in &mut self.proposals {
            proposal.tokens.clear();
        }
    }

    /// Asks every drafter. False: there is nothing to verify.
    pub(crate) fn propose(&mut self, text: Text<'_>) -> bool {
        let most = text.most.min(MAX_DRAFT);
        if most == 0 || self.mode == Speculation::Off {
            return false;
        }
        let text = Text { most, ..text };
        self.ask_session(text);
        self.ask_corpora(text);
        self.ask_pushed(text);
        let mut any = false;
        for proposal in &mut self.proposals {
            let tokens = &mut proposal.tokens;
            // What is no token cannot be computed, and nothing comes after a stop token.
            let known = tokens.iter().take_while(|&&t| (t as usize) < text.vocab);
            let mut end = known.count();
            if let Some(stop) = tokens[..end].iter().position(|t| text.stops.contains(t)) {
                end = stop + 1;
            }
            tokens.truncate(end);
            any |= end > 0;
        }
        any
    }

    fn ask_session(&mut self, text: Text<'_>) {
        let tokens = text.tokens;
        let index = self
            .index
            .get_or_insert_with(|| SessionIndex::new(2 * tokens.len()));
        index.extend(tokens);
        let Some(found) = index.longest(tokens) else {
            return;
        };
        let proposal = &mut self.proposals[Drafter::Session as usize];
        proposal.length = found.length;
        let next = found.next as usize;
        let copied = &tokens[next..tokens.len().min(next + text.most)];
        proposal.tokens.extend_from_slice(copied);
        // A copy that reaches the end goes on into itself: a period repeats.
        let period = tokens.len() - next;
        while proposal.tokens.len() < text.most {
            proposal
                .tokens
                .push(proposal.tokens[proposal.tokens.len() - period]);
        }
    }

    fn ask_corpora(&mut self, text: Text<'_>) {
        for (drafter, corpus) in &self.corpora {
            // Whoever writes is not waited for.
            let Ok(corpus) = corpus.try_read() else {
                continue;
            };
            if let Some(found) = corpus.longest(text.tokens) {
                let proposal = &mut self.proposals[*drafter as usize];
                proposal.length = found.length;
                proposal.tokens.extend(corpus.read(found.next, text.most));
            }
        }
    }

    fn ask_pushed(&mut self, text: Text<'_>) {
        let Some(draft) = &self.pushed else { return };
        let proposal = &mut self.proposals[Drafter::Pushed as usize];
        proposal.length = 0;
        let (tokens, path) = (text.tokens, &mut proposal.tokens);
        if draft.land(tokens, text.prompt, text.most, path) == Landing::Useless {
            self.pushed = None;
        }
    }

    /// Chooses the proposal of which most tokens are expected to be right, and gives the chance
    /// that each of its tokens is reached and right: never rising.
    pub(crate) fn choose<'a>(&'a mut self, chances: Chances<'a>) -> impl Iterator<Item = f32> + 'a {
        let mut best = 0.0;
        for drafter in Drafter::ALL {
            let expected = self.survivals(chances, drafter).sum::<f32>();
            if expected > best {
                (best, self.chosen) = (expected, drafter);
            }
        }
        self.survivals(chances, self.chosen)
    }

    fn survivals<'a>(
        &'a self,
        chances: Chances<'a>,
        drafter: Drafter,
    ) -> impl Iterator<Item = f32> + 'a {
        let proposal = &self.proposals[drafter as usize];
        let kind = Kind {
            drafter,
            length: proposal.length,
        };
        (0..proposal.tokens.len()).scan(1.0f32, move |survival, position| {
            *survival *= self.reliability.adjust(chances.at(kind, position));
            Some(*survival)
        })
    }

    /// Tokens of the chosen proposal.
    pub(crate) fn available(&self) -> usize {
        self.proposals[self.chosen as usize].tokens.len()
    }

    /// Has so many tokens of the chosen proposal verified.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        self.rows = rows.min(self.available());
    }

    /// The tokens to verify in the step being planned.
    pub(crate) fn rows(&self) -> &[TokenId] {
        &self.proposals[self.chosen as usize].tokens[..self.rows]
    }

    /// Learns from what the step made: every drafter is judged, whoever was chosen.
    pub(crate) fn settle(
        &mut self,
        hazards: &mut Hazards,
        tenant: &Namespace,
        made: &[TokenId],
    ) -> Settled {
        for drafter in Drafter::ALL {
            let proposal = &self.proposals[drafter as usize];
            if proposal.tokens.is_empty() || made.is_empty() {
                continue;
            }
            let kind = Kind {
                drafter,
                length: proposal.length,
            };
            let right = proposal
                .tokens
                .iter()
                .zip(made)
                .map(|(guess, token)| guess == token);
            // The first wrong guess is the last that is judged.
            let mut sound = true;
            let outcomes = right.take_while(move |&right| std::mem::replace(&mut sound, right));
            if drafter == self.chosen {
                let chances = hazards.of(tenant);
                for (position, right) in outcomes.clone().enumerate() {
                    self.reliability.learn(chances.at(kind, position), right);
                }
            }
            hazards.learn(tenant, kind, outcomes);
        }
        let rows = self.rows;
        // The last token made came from the row after the last right guess.
        let accepted = made.len().saturating_sub(1).min(rows);
        self.drafted += rows as u32;
        self.accepted += accepted as u32;
        Settled {
            drafter: self.chosen,
            rows,
            accepted,
        }
    }

    /// Draft rows computed and draft tokens that were right, so far.
    pub(crate) fn totals(&self) -> (u32, u32) {
        (self.drafted, self.accepted)
    }
}

/// What became of a sequence's draft rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) drafter: Drafter,
    pub(crate) rows: usize,
    pub(crate) accepted: usize,
}
