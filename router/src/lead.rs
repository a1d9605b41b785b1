//! A draft worker that runs ahead of a generation: it is told what the target has, and what it
//! says of the tokens after that goes to the target as drafts. Neither ever waits for the other.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use shoal_core::{Speculation, TokenId, draft_anchor};
use shoal_proto::worker::{Draft, Finish, SequenceOutput, Submit};

use crate::{
    cluster::Cluster,
    metrics::Metrics,
    request::Job,
    session::{Attachment, Event},
    worker::Connected,
};

/// Draft workers that one generation is led by, one after the other.
const MAX_LEADS: u32 = 3;
/// Tokens that a draft worker runs ahead, at most.
const AHEAD: u32 = 16;
/// Tokens that a generation must have before it to be worth a prefill at a draft worker.
const LEAST_LEFT: usize = 8;
/// Where it does not pay, one of so many generations is led all the same: things change.
const PROBE: u32 = 16;
/// Tokens that are judged before a generation is led no longer.
const TRIAL: u32 = 32;
/// What is assumed of a draft worker of which nothing is known.
const FIRST_RATE: f32 = 0.7;
/// Weight of a new token in the rates of a draft worker and of a generation.
const WEIGHT: f32 = 1.0 / 256.0;
const OWN_WEIGHT: f32 = 1.0 / 32.0;
/// The anchor is of the text's end: so many tokens will do.
const ANCHOR: usize = 64;

/// How often a draft worker had said a token before its target made it.
#[derive(Debug)]
pub(crate) struct Score {
    /// As the bits of a number from 0 to 1.
    rate: AtomicU32,
    refused: AtomicU32,
}

impl Default for Score {
    fn default() -> Self {
        Self {
            rate: AtomicU32::new(FIRST_RATE.to_bits()),
            refused: AtomicU32::new(0),
        }
    }
}

impl Score {
    fn rate(&self) -> f32 {
        f32::from_bits(self.rate.load(Ordering::Relaxed))
    }

    fn learn(&self, right: bool) {
        // One of two that learn at one time may be lost.
        let rate = smoothed(self.rate(), right, WEIGHT);
        self.rate.store(rate.to_bits(), Ordering::Relaxed);
    }

    /// Whether to begin, where a draft row must have this chance to be worth its time.
    fn admits(&self, price: f32) -> bool {
        self.rate() >= price || {
            let refused = self.refused.fetch_add(1, Ordering::Relaxed);
            refused % PROBE == PROBE - 1
        }
    }
}

fn smoothed(rate: f32, right: bool, weight: f32) -> f32 {
    rate + weight * (f32::from(u8::from(right)) - rate)
}

/// What a generation is led for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Led<'a> {
    pub(crate) job: &'a Job,
    pub(crate) choice: u32,
    pub(crate) sequence: u64,
    pub(crate) output: &'a [TokenId],
}

/// The draft workers of a generation, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Leads {
    lead: Option<Lead>,
    /// So many began so far; the most, where there is to be no other.
    begun: u32,
}

impl Leads {
    /// What a draft worker says next; without one, nothing ever. Cancel-safe.
    pub(crate) async fn next(&self) -> Event {
        match &self.lead {
            Some(lead) => lead.attachment.next().await,
            None => std::future::pending().await,
        }
    }

    /// The target has made these last tokens of the output. Finds a draft worker if there is none.
    pub(crate) fn follow(
        &mut self,
        cluster: &Cluster,
        metrics: &Metrics,
        target: &Connected,
        led: Led<'_>,
        made: &[TokenId],
    ) {
        if let Some(lead) = &mut self.lead {
            lead.follow(made);
            if led.job.speculation == Speculation::Auto && !lead.pays(target) {
                self.lead = None;
                self.begun = MAX_LEADS;
            }
        } else if self.begun < MAX_LEADS {
            self.lead = Lead::start(cluster, metrics, target, led, self.begun);
            // What is not begun with the first tokens is not begun.
            self.begun = match self.lead {
                Some(_) => self.begun + 1,
                None => MAX_LEADS,
            };
        }
    }

    /// The draft worker has said something: a draft for the target, of `prompt` and `output`, if
    /// there is anything new in it.
    pub(crate) fn hear(
        &mut self,
        event: Event,
        prompt: &[TokenId],
        output: &[TokenId],
    ) -> Option<Draft> {
        let heard = self.lead.as_mut()?.hear(event, prompt, output);
        heard.unwrap_or_else(|Gone| {
            self.lead = None;
            None
        })
    }

    /// The generation is complete.
    pub(crate) fn end(&mut self) {
        self.lead = None;
    }
}

/// See the [module](self).
#[derive(Debug)]
struct Lead {
    attachment: Attachment,
    drafter: Arc<Connected>,
    metrics: Metrics,
    ahead: Ahead,
    /// How often it was right here, of the tokens judged so far.
    rate: f32,
    judged: u32,
}

impl Lead {
    /// Finds a draft worker of the target's tokenizer and has it run ahead, if that is asked for
    /// or pays; at once, or not at all.
    fn start(
        cluster: &Cluster,
        metrics: &Metrics,
        target: &Connected,
        led: Led<'_>,
        attempt: u32,
    ) -> Option<Self> {
        let (job, done) = (led.job, led.output.len());
        let left = (job.stopping.max_tokens as usize).saturating_sub(done);
        if left < LEAST_LEFT {
            return None;
        }
        let drafter = cluster.drafter(&target.model)?;
        let fits = job.prompt.len() + done + AHEAD as usize <= drafter.model.context() as usize;
        let pays = match job.speculation {
            Speculation::Off => false,
            Speculation::Auto => drafter.score.admits(price(target)),
            Speculation::Fixed(_) => true,
        };
        if !fits || !pays {
            return None;
        }
        let attachment = drafter.session.lead(submission(led, attempt, &drafter))?;
        metrics.led_sequences.inc();
        Some(Self {
            attachment,
            rate: drafter.score.rate(),
            drafter,
            metrics: metrics.clone(),
            ahead: Ahead::new(done),
            judged: 0,
        })
    }

    /// The target has made these tokens.
    fn follow(&mut self, made: &[TokenId]) {
        self.attachment.follow(self.ahead.base as u32, made);
        for &token in made {
            let right = self.ahead.pass(token);
            self.drafter.score.learn(right);
            self.rate = smoothed(self.rate, right, OWN_WEIGHT);
            self.judged += 1;
            self.metrics.led_tokens.inc();
            self.metrics.led_right_tokens.inc_by(right.into());
        }
    }

    /// Whether it is still worth it for a generation that did not ask for it.
    fn pays(&self, target: &Connected) -> bool {
        self.judged < TRIAL || self.rate >= price(target)
    }

    /// A draft of what is said; `None` where there is nothing new in it.
    fn hear(
        &mut self,
        event: Event,
        prompt: &[TokenId],
        output: &[TokenId],
    ) -> Result<Option<Draft>, Gone> {
        let Event::Output(said) = event else {
            return Err(Gone);
        };
        if said.finish() != Finish::Unspecified {
            return Err(Gone);
        }
        if !self.ahead.hear(&said, output) {
            return Ok(None);
        }
        let end = |tokens: &[TokenId]| tokens[tokens.len().saturating_sub(ANCHOR)..].to_vec();
        let text = [end(prompt), end(output)].concat();
        Ok(Some(Draft {
            base: output.len() as u32,
            anchor: draft_anchor(&text),
            tokens: self.ahead.tokens.clone(),
            ..Draft::default()
        }))
    }
}

/// The draft worker does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gone;

/// The chance that a draft row must have at the target to be worth its time.
fn price(target: &Connected) -> f32 {
    target.load().admit_milli as f32 / 1e3
}

/// The same noise draws the same tokens, as far as the models agree.
fn submission(led: Led<'_>, attempt: u32, drafter: &Connected) -> Submit {
    let job = led.job;
    Submit {
        sequence: led.sequence,
        attempt,
        epoch: drafter.model.description.epoch,
        prompt: job.prompt.clone(),
        resume: led.output.to_vec(),
        sampling: Some(job.sampling.clone()),
        stopping: Some(job.stopping.clone()),
        seed: job.seed,
        choice: led.choice,
        cache_namespace: job.namespace.as_bytes().to_vec(),
        priority: job.priority,
        request_id: job.arrival.request_id.to_string(),
        draft_rows: Some(0),
        lead: Some(AHEAD),
        ..Submit::default()
    }
}

/// What is said of the tokens after the target's.
#[derive(Debug)]
struct Ahead {
    /// Output tokens of the target.
    base: usize,
    tokens: Vec<TokenId>,
}

impl Ahead {
    fn new(base: usize) -> Self {
        Self {
            base,
            tokens: Vec::new(),
        }
    }

    /// The target has made a token. Whether it was said before.
    fn pass(&mut self, token: TokenId) -> bool {
        self.base += 1;
        let right = self.tokens.first() == Some(&token);
        if right {
            self.tokens.remove(0);
        } else {
            // What came after a wrong one was said of another text.
            self.tokens.clear();
        }
        right
    }

    /// Takes in what is said of the tokens after `output`. False: nothing is.
    fn hear(&mut self, said: &SequenceOutput, output: &[TokenId]) -> bool {
        let offset = said.output_offset as usize;
        let known = self.base.saturating_sub(offset);
        let Some((old, new)) = said.tokens.split_at_checked(known) else {
            return false;
        };
        let agrees = output
            .get(offset..)
            .is_none_or(|since| since.starts_with(old));
        let kept = (offset + known).checked_sub(self.base);
        match kept.filter(|&kept| agrees && kept <= self.tokens.len()) {
            Some(kept) if !new.is_empty() => {
                self.tokens.truncate(kept);
                self.tokens.extend_from_slice(new);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(offset: u32, tokens: &[TokenId]) -> SequenceOutput {
        SequenceOutput {
            output_offset: offset,
            tokens: tokens.to_vec(),
            ..SequenceOutput::default()
        }
    }

    #[test]
    fn what_is_said_ahead_is_kept_while_it_is_right() {
        let mut ahead = Ahead::new(2);
        let mut output = vec![1, 2];
        assert!(ahead.hear(&said(2, &[3, 4]), &output));
        assert!(ahead.hear(&said(4, &[5, 6]), &output));
        assert_eq!(ahead.tokens, [3, 4, 5, 6]);
        for (token, right, left) in [(3, true, 3), (9, false, 0), (5, false, 0)] {
            assert_eq!(ahead.pass(token), right);
            output.push(token);
            assert_eq!(ahead.tokens.len(), left);
        }
        // It went on from a wrong token, and has not heard: nothing of that counts.
        assert!(!ahead.hear(&said(3, &[4, 5, 6]), &output));
        assert!(!ahead.hear(&said(6, &[7]), &output));
        // It went back.
        assert!(ahead.hear(&said(3, &[9, 5, 8]), &output));
        assert_eq!(ahead.tokens, [8]);
        assert!(ahead.hear(&said(5, &[7, 7]), &output));
        assert_eq!(ahead.tokens, [7, 7], "the newest wins");
    }

    #[test]
    fn what_comes_late_is_no_draft() {
        let mut ahead = Ahead::new(4);
        assert!(!ahead.hear(&said(2, &[3, 4]), &[1, 2, 3, 4]));
        assert!(!ahead.hear(&said(1, &[2]), &[1, 2, 3, 4]));
        assert!(ahead.hear(&said(3, &[4, 5]), &[1, 2, 3, 4]));
        assert_eq!(ahead.tokens, [5]);
    }

    #[test]
    fn a_draft_worker_that_does_not_pay_is_asked_now_and_then() {
        let score = Score::default();
        assert!(score.admits(0.5) && !score.admits(0.9));
        (0..2000).for_each(|_| score.learn(false));
        let admitted = (0..10 * PROBE).filter(|_| score.admits(0.5)).count();
        assert_eq!(admitted, 10);
        assert!(score.admits(0.0), "rows that are free are worth any chance");
        (0..2000).for_each(|_| score.learn(true));
        assert!(score.admits(0.9));
    }
}
