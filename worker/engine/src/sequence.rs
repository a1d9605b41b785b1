//! One sequence: its tokens, how far they are computed, and what it holds.

use std::time::{Duration, Instant};

use shoal_core::{
    Namespace, PAGE_TOKENS, PageHash, Role, Sampling, Scoring, Speculation, Stopping, TokenId,
    prompt_pages,
};

use crate::backend::NumericsId;
use crate::config::Limits;
use crate::kv::{Insert, KvPages, Prefix};
use crate::request::{Finish, Logprob, Request, SequenceKey, SequenceOutput, SubmitError, Usage};
use crate::sampler::Counts;
use crate::speculation::{Drafting, Hazards, Settled, Text};

/// The order of service, first come first: submission time less the head start that the
/// class gives. Unique, so it is a total order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    /// Microseconds since the engine started.
    virtual_start: i64,
    ordinal: u64,
}

impl Rank {
    /// The rank of the `ordinal`-th submission, `since_start` after the engine's start.
    fn new(ordinal: u64, since_start: Duration, class: u32, aging: Duration) -> Self {
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        let head_start = i64::from(class).saturating_mul(micros(aging));
        Self {
            virtual_start: micros(since_start).saturating_sub(head_start),
            ordinal,
        }
    }
}

/// How a sequence runs ahead of one elsewhere.
#[derive(Clone, Copy, Debug)]
struct Lead {
    /// Tokens ahead, at most.
    most: usize,
    /// Output tokens that the other one is known to have.
    told: usize,
}

/// A sequence, waiting or running.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) key: SequenceKey,
    pub(crate) rank: Rank,
    pub(crate) priority: u32,
    pub(crate) deadline: Option<Instant>,
    pub(crate) sampling: Sampling,
    pub(crate) stopping: Stopping,
    pub(crate) scoring: Scoring,
    /// Occurrences of tokens, for the penalties.
    pub(crate) counts: Counts,
    /// Held pages, in order of position.
    pub(crate) pages: Vec<u32>,
    /// Tokens, from the start, whose keys and values are in the pages.
    pub(crate) computed: usize,
    /// Rows in the step being planned.
    pub(crate) planned: usize,
    /// Prompt tokens that no page held when it began to wait.
    pub(crate) uncached: usize,
    /// What is verified beside the decode row.
    pub(crate) drafting: Drafting,
    /// Set once it has ended; its output is out.
    pub(crate) ended: bool,
    namespace: Namespace,
    /// Prompt, then output.
    tokens: Vec<TokenId>,
    prompt: usize,
    lead: Option<Lead>,
    /// Most output tokens: `max_tokens`, or what the context leaves.
    max_output: usize,
    vocab: usize,
    /// Chained hashes of the full prompt pages.
    hashes: Vec<PageHash>,
    /// Leading pages known to be cached; `None` once one could not be.
    cached_pages: Option<usize>,
    /// Scores of the first prompt tokens; kept over a preemption.
    prompt_scores: Vec<Logprob>,
    /// Prompt scores there will be.
    prompt_scores_wanted: usize,
    submitted: Instant,
    admitted: Option<Instant>,
    first_output: Option<Instant>,
    cached_tokens: u32,
    preemptions: u32,
}

impl Sequence {
    /// Checks a request and makes it a sequence, submitted at `now`. It has no rank yet.
    pub(crate) fn new(
        request: Request,
        limits: &Limits,
        numerics: &NumericsId,
        now: Instant,
    ) -> Result<Self, SubmitError> {
        let vocab = u32::try_from(limits.vocab).unwrap_or(u32::MAX);
        request.sampling.validate(vocab)?;
        request.stopping.validate(vocab)?;
        request.scoring.validate()?;
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        let limit = limits.sequence_tokens;
        if prompt > limit {
            return Err(SubmitError::PromptTooLong {
                tokens: prompt,
                limit,
            });
        }
        let mut tokens = request.prompt;
        tokens.extend_from_slice(&request.resume);
        if let Some(&token) = tokens.iter().find(|&&token| token >= vocab) {
            return Err(SubmitError::UnknownToken {
                token,
                vocab: limits.vocab,
            });
        }
        let max_output = (request.stopping.max_tokens as usize).min(limit - prompt);
        if request.resume.len() > max_output {
            return Err(SubmitError::OutputTooLong {
                tokens: request.resume.len(),
                limit: max_output,
            });
        }
        let hashes = prompt_pages(&request.namespace, &numerics.0, &tokens[..prompt]).collect();
        let mut prompt_scores = Vec::new();
        let mut prompt_scores_wanted = 0;
        if request.scoring.prompt_top.is_some() {
            prompt_scores_wanted = prompt;
            prompt_scores.reserve_exact(prompt);
            prompt_scores.push(Logprob {
                logprob: None,
                top: Vec::new(),
            });
        }
        Ok(Self {
            key: request.key,
            rank: Rank::default(),
            priority: request.priority,
            deadline: request.deadline,
            counts: Counts::new(&request.sampling, &tokens[..prompt], &tokens[prompt..]),
            sampling: request.sampling,
            stopping: request.stopping,
            scoring: request.scoring,
            pages: Vec::new(),
            computed: 0,
            planned: 0,
            uncached: prompt,
            drafting: Drafting::new(
                speculation(request.speculation, limits.speculation),
                request.corpora,
            ),
            ended: false,
            namespace: request.namespace,
            lead: request.lead.map(|most| Lead {
                most: most as usize,
                told: tokens.len() - prompt,
            }),
            tokens,
            prompt,
            max_output,
            vocab: limits.vocab,
            hashes,
            cached_pages: Some(0),
            prompt_scores,
            prompt_scores_wanted,
            submitted: now,
            admitted: None,
            first_output: None,
            cached_tokens: 0,
            preemptions: 0,
        })
    }

    /// Gives it its rank. One that goes on where another worker left off is of a class above its
    /// priority: its client waits amid a text.
    pub(crate) fn enter(&mut self, ordinal: u64, since_start: Duration, aging: Duration) {
        let class = self.priority.saturating_add(self.is_broken_off().into());
        self.rank = Rank::new(ordinal, since_start, class, aging);
    }

    /// All tokens: prompt, then output.
    pub(crate) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Tokens of the prompt.
    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt
    }

    /// Tokens of the output, those resumed included.
    pub(crate) fn output_len(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Tokens whose keys and values are still to be computed.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Of the pending tokens, the first ones that have the same role.
    pub(crate) fn pending_of_a_role(&self) -> usize {
        match self.prompt.saturating_sub(self.computed) {
            0 => self.pending(),
            prompt => prompt,
        }
    }

    /// The output from a position on.
    pub(crate) fn output_from(&self, offset: usize) -> &[TokenId] {
        &self.tokens[self.prompt + offset..]
    }

    /// The role of the token at a position.
    pub(crate) fn role(&self, position: usize) -> Role {
        if position < self.prompt {
            Role::Prompt
        } else {
            Role::Output
        }
    }

    /// Whether the next row is the last known token, made by the model: a decode row.
    pub(crate) fn is_decoding(&self) -> bool {
        self.pending() == 1 && self.computed >= self.prompt
    }

    /// Whether its client has tokens that are to be computed again before it makes more.
    pub(crate) fn is_broken_off(&self) -> bool {
        self.output_len() > 0 && !self.is_decoding() && !self.leads()
    }

    /// Whether the step being planned has a decode row of it.
    pub(crate) fn decodes(&self) -> bool {
        self.planned > 0 && self.is_decoding()
    }

    /// Whose pages it shares.
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Asks its drafters for the tokens after the last one. False: there are none.
    pub(crate) fn propose(&mut self) -> bool {
        let left = self.max_output - self.output_len();
        self.drafting.propose(Text {
            tokens: &self.tokens,
            prompt: self.prompt,
            // The row after the last draft token makes a token, too.
            most: left.saturating_sub(1),
            vocab: self.vocab,
            stops: &self.stopping.stop_tokens,
        })
    }

    /// Learns from the output made since `offset`, and says what became of its draft.
    pub(crate) fn settle_draft(&mut self, hazards: &mut Hazards, offset: usize) -> Settled {
        let made = &self.tokens[self.prompt + offset..];
        self.drafting.settle(hazards, &self.namespace, made)
    }

    /// Pages that the known tokens fill.
    pub(crate) fn pages_needed(&self) -> usize {
        self.tokens.len().div_ceil(PAGE_TOKENS)
    }

    /// The pages that may come from the cache now. The last token, and every one whose logits
    /// are still wanted, is computed whatever is cached.
    pub(crate) fn reusable(&self) -> Prefix<'_> {
        let mut tokens = self.prompt.min(self.tokens.len() - 1);
        if self.scores_missing() {
            tokens = tokens.min(self.next_scored() - 1);
        }
        Prefix {
            hashes: &self.hashes[..tokens / PAGE_TOKENS],
            ..self.prompt_pages()
        }
    }

    fn prompt_pages(&self) -> Prefix<'_> {
        Prefix {
            namespace: &self.namespace,
            hashes: &self.hashes,
            tokens: &self.tokens,
        }
    }

    /// Whether this sequence is about to compute page `page`, of this hash, itself.
    pub(crate) fn will_compute(&self, page: usize, hash: PageHash) -> bool {
        self.computed < (page + 1) * PAGE_TOKENS
            && self.hashes.get(page) == Some(&hash)
            && self.cached_pages.is_some()
    }

    /// Takes its pages: the first `hits` of `pages` hold computed tokens.
    pub(crate) fn admit(&mut self, hits: usize, now: Instant) {
        self.computed = hits * PAGE_TOKENS;
        self.cached_pages = Some(hits);
        if self.admitted.is_none() {
            self.admitted = Some(now);
            self.cached_tokens = self.computed as u32;
        }
    }

    /// Time from submission to first admission, once admitted.
    pub(crate) fn queued(&self) -> Option<Duration> {
        let admitted = self.admitted?;
        Some(admitted.saturating_duration_since(self.submitted))
    }

    /// Whether it has never run.
    pub(crate) fn is_new(&self) -> bool {
        self.admitted.is_none()
    }

    /// Loses its pages; keeps its output and its scores.
    pub(crate) fn preempt(&mut self, kv: &mut KvPages) {
        kv.release(&mut self.pages);
        self.drafting.reset();
        self.computed = 0;
        self.planned = 0;
        self.preemptions += 1;
    }

    /// Whether prompt scores are still to be made.
    pub(crate) fn scores_missing(&self) -> bool {
        self.prompt_scores.len() < self.prompt_scores_wanted
    }

    /// Position of the next prompt token to be scored.
    pub(crate) fn next_scored(&self) -> usize {
        self.prompt_scores.len()
    }

    /// Of the rows from `computed` on, `rows` of them, those whose logits give prompt scores.
    pub(crate) fn scoring_rows(&self, rows: usize) -> std::ops::Range<usize> {
        if !self.scores_missing() {
            return 0..0;
        }
        let end = (self.computed + rows).min(self.prompt - 1);
        let start = (self.next_scored() - 1).max(self.computed);
        start..end.max(start)
    }

    /// Whether a step of `rows` rows ends with a row to draw a token from.
    pub(crate) fn samples_after(&self, rows: usize) -> bool {
        rows == self.pending() && self.output_len() < self.max_output
    }

    /// Notes the score of the next prompt token.
    pub(crate) fn push_score(&mut self, score: Logprob) {
        self.prompt_scores.push(score);
    }

    /// The prompt scores, once, when they are complete.
    pub(crate) fn take_scores(&mut self) -> Vec<Logprob> {
        if self.scores_missing() {
            return Vec::new();
        }
        self.prompt_scores_wanted = 0;
        std::mem::take(&mut self.prompt_scores)
    }

    /// Offers the prompt pages that have become full to the cache.
    pub(crate) fn cache_pages(&mut self, kv: &mut KvPages) {
        let full = self.computed.min(self.prompt) / PAGE_TOKENS;
        while let Some(at) = self.cached_pages.filter(|&at| at < full) {
            self.cached_pages = match kv.insert(self.prompt_pages(), at, &self.pages) {
                Insert::Cached => Some(at + 1),
                Insert::Replaced(page) => {
                    self.pages[at] = page;
                    Some(at + 1)
                }
                Insert::Refused => None,
            };
        }
    }

    /// Appends an output token made at `now`.
    pub(crate) fn push(&mut self, token: TokenId, now: Instant) {
        self.tokens.push(token);
        self.counts.push(token);
        self.first_output.get_or_insert(now);
    }

    /// Whether it runs ahead of a sequence elsewhere.
    pub(crate) fn leads(&self) -> bool {
        self.lead.is_some()
    }

    /// Whether it is far enough ahead, and waits to be told more.
    pub(crate) fn rests(&self) -> bool {
        let Some(lead) = self.lead else { return false };
        let output = &self.tokens[self.prompt..];
        let ends = |token| self.stopping.stop_tokens.contains(token);
        let ahead = output.len() >= (lead.told + lead.most).min(self.max_output)
            || output.last().is_some_and(ends);
        ahead && self.pending() <= 1
    }

    /// Takes over what the sequence ahead of which it runs has from an output position on; what
    /// it made itself stays where that is the same.
    pub(crate) fn follow(&mut self, base: usize, told: &[TokenId]) {
        let Some(lead) = &mut self.lead else { return };
        let is_known = |&token: &TokenId| (token as usize) < self.vocab;
        if base > self.tokens.len() - self.prompt || !told.iter().all(is_known) {
            return;
        }
        let told = &told[..told.len().min(self.max_output - base)];
        lead.told = lead.told.max(base + told.len());
        let made = self.tokens[self.prompt + base..].iter();
        let same = made
            .zip(told)
            .take_while(|(made, told)| made == told)
            .count();
        if same == told.len() {
            return;
        }
        let first = self.prompt + base + same;
        self.tokens.truncate(first);
        self.tokens.extend_from_slice(&told[same..]);
        self.computed = self.computed.min(first);
        let (prompt, output) = self.tokens.split_at(self.prompt);
        self.counts = Counts::new(&self.sampling, prompt, output);
    }

    /// Why it ends with the tokens it has, if it does.
    pub(crate) fn finish(&self) -> Option<Finish> {
        if self.leads() {
            return None;
        }
        let output = &self.tokens[self.prompt..];
        if let Some(last) = output.last() {
            let may_stop = output.len() > self.stopping.min_tokens as usize;
            if may_stop && self.stopping.stop_tokens.contains(last) {
                return Some(Finish::Stop);
            }
        }
        let prefilled = !output.is_empty() || self.pending() == 0;
        let complete = output.len() >= self.max_output && !self.scores_missing() && prefilled;
        complete.then_some(Finish::Length)
    }

    /// Tokens that may not be drawn now: stop tokens, until there is enough output.
    pub(crate) fn masked(&self) -> &[TokenId] {
        if self.output_len() < self.stopping.min_tokens as usize {
            &self.stopping.stop_tokens
        } else {
            &[]
        }
    }

    /// The output that says that it ended.
    pub(crate) fn farewell(&self, finish: Finish) -> SequenceOutput {
        SequenceOutput {
            key: self.key,
            offset: self.output_len() as u32,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            finish: Some((finish, self.usage())),
        }
    }

    /// What it has cost so far.
    pub(crate) fn usage(&self) -> Usage {
        let prefill = match (self.admitted, self.first_output) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        let (drafted, accepted) = self.drafting.totals();
        Usage {
            cached_tokens: self.cached_tokens,
            queued: self.queued().unwrap_or_default(),
            prefill,
            preemptions: self.preemptions,
            drafted,
            accepted,
        }
    }
}

/// How a sequence is drafted for: as it asks, or as the engine does for those that do not.
fn speculation(asked: Speculation, engine: Speculation) -> Speculation {
    match (asked, engine) {
        (_, Speculation::Off) => Speculation::Off,
        (Speculation::Auto, engine) => engine,
        (asked, _) => asked,
    }
}
