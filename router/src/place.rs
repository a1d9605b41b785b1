//! The choice of a worker for one sequence.

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
};

use shoal_core::{Namespace, PAGE_TOKENS, PageHash, TokenId, prompt_pages};

use crate::{
    breaker::Pass,
    cluster::{Cluster, Ready},
    model::Model,
    pages::Coming,
    placement::{self, Candidate, Work},
    worker::Connected,
};

/// What a placement asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) model: &'a Model,
    pub(crate) prompt: &'a [TokenId],
    /// Output tokens so far, how many more are expected, and the most that there may be in all.
    pub(crate) resumed: usize,
    pub(crate) output: f64,
    pub(crate) max_tokens: usize,
    /// Whose pages it may share.
    pub(crate) namespace: &'a Namespace,
    /// Keeps a conversation on one worker; empty is none.
    pub(crate) session_id: &'a str,
    /// Preferred numerics: the output so far was made with them. Empty is any.
    pub(crate) numerics_id: &'a [u8],
    /// Workers that just refused, by address.
    pub(crate) avoid: &'a [Arc<str>],
    pub(crate) at: Option<At<'a>>,
}

/// Where a sequence is while it waits for its first output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At<'a> {
    pub(crate) connected: &'a Arc<Connected>,
    /// Tokens of its own that wait there for their prefill.
    pub(crate) unstarted: u64,
    /// Its output is what the worker's breaker waits for.
    pub(crate) probes: bool,
}

impl At<'_> {
    fn is(&self, ready: &Ready) -> bool {
        Arc::ptr_eq(self.connected, &ready.connected)
    }
}

/// A worker to submit to.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) address: Arc<str>,
    pub(crate) connected: Arc<Connected>,
    /// For the verdict on the worker.
    pub(crate) pass: Pass,
    /// Prompt tokens that the worker is believed to hold, and all that it has to prefill.
    pub(crate) cached: u64,
    pub(crate) uncached: u64,
    /// For as long as the sequence is there.
    pub(crate) coming: Coming,
}

impl Ready {
    fn numerics_id(&self) -> &[u8] {
        &self.connected.model.description.numerics_id
    }
}

impl Cluster {
    /// The worker that takes a sequence, by the routing in force.
    pub(crate) fn place(&self, wanted: &Wanted<'_>) -> Option<Place> {
        let mut ready = self.ready();
        // A name alone may stand for several vocabularies while a model is replaced.
        ready.retain(|r| {
            let model = &r.connected.model;
            model.shares_tokens(wanted.model) && model.context() as usize >= wanted.least()
        });
        // A shorter context would end the answer early.
        let whole = |r: &Ready| r.connected.model.context() as usize >= wanted.most();
        if ready.iter().any(whole) {
            ready.retain(whole);
        }
        // A membership that has lost everybody is no outage.
        if ready.iter().any(|r| !r.worker.is_retired()) {
            ready.retain(|r| !r.worker.is_retired());
        }
        let home = home(&ready, wanted.session_id);
        // A breaker that lets one try admits no other, and not that one again.
        let probed = |r: &Ready| wanted.at.is_some_and(|at| at.probes && at.is(r));
        ready.retain(|r| {
            let admitted = r.worker.breaker.admits() || probed(r);
            admitted && !wanted.avoid.contains(&r.worker.address)
        });
        let same =
            |r: &Ready| wanted.numerics_id.is_empty() || r.numerics_id() == wanted.numerics_id;
        if ready.iter().any(same) {
            ready.retain(same);
        }
        // One list of hashes serves all workers that compute alike.
        let mut hashes: Vec<(&[u8], Vec<PageHash>)> = Vec::new();
        for r in &ready {
            if !hashes.iter().any(|(id, _)| *id == r.numerics_id()) {
                hashes.push((r.numerics_id(), wanted.pages(r.numerics_id())));
            }
        }
        let pages = |r: &Ready| {
            let list = hashes.iter().find(|(id, _)| *id == r.numerics_id());
            list.map_or(&[][..], |(_, pages)| pages)
        };
        let mut candidates: Vec<Candidate> = Vec::with_capacity(ready.len());
        for r in &ready {
            let index = &r.connected.pages;
            let at = wanted.at.filter(|at| at.is(r));
            let mut cached = index.overlap(pages(r), at.is_some()) * PAGE_TOKENS;
            if !index.is_exact() && home.as_ref() == Some(&r.worker.address) {
                // It held the conversation's earlier turns; nothing better is known.
                cached = wanted.prompt.len();
            }
            let mut candidate = r.connected.candidate(cached as f64);
            if let Some(at) = at {
                candidate.placed = candidate.placed.without(at.unstarted);
            }
            candidates.push(candidate);
        }
        let tokens = wanted.prompt.len() + wanted.resumed;
        let work = Work {
            prompt: tokens as f64,
            output: wanted.output,
        };
        let chosen = placement::choose(self.routing, &candidates, &work, self.turn())?;
        let cached = candidates[chosen].cached as u64;
        let Ready { worker, connected } = &ready[chosen];
        Some(Place {
            // Of an open breaker it is the probe already, or another has become it meanwhile.
            pass: worker.breaker.enter()?,
            coming: connected.pages.expect(pages(&ready[chosen]).to_vec()),
            address: worker.address.clone(),
            connected: connected.clone(),
            cached,
            uncached: (tokens as u64).saturating_sub(cached),
        })
    }
}

impl Wanted<'_> {
    /// Tokens of the whole answer and its prompt.
    fn most(&self) -> usize {
        self.prompt.len() + self.max_tokens
    }

    /// Tokens without which it is refused, or ends before its next one.
    fn least(&self) -> usize {
        self.prompt.len() + self.max_tokens.min(self.resumed + 1)
    }

    /// The pages of the prompt that a cache can give: its last token is always computed,
    /// where the sequence has no output yet.
    fn pages(&self, numerics_id: &[u8]) -> Vec<PageHash> {
        let reusable = self
            .prompt
            .len()
            .saturating_sub(usize::from(self.resumed == 0));
        prompt_pages(self.namespace, numerics_id, &self.prompt[..reusable]).collect()
    }
}

/// The worker on which a conversation lives: highest random weight (Thaler, Ravishankar
/// 1998), so that a change of the cluster moves as few conversations as possible.
fn home(ready: &[Ready], session_id: &str) -> Option<Arc<str>> {
    if session_id.is_empty() {
        return None;
    }
    let weight = |r: &&Ready| {
        let mut hasher = std::hash::DefaultHasher::new();
        (session_id, &r.worker.address).hash(&mut hasher);
        hasher.finish()
    };
    let home = ready.iter().max_by_key(weight);
    home.map(|r| r.worker.address.clone())
}

#[cfg(test)]
mod tests;
