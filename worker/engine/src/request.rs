//! What goes into the engine and what comes out.

use std::time::{Duration, Instant};

use shoal_core::{
    Class, Namespace, PageHash, ParamError, Sampling, Scoring, Speculation, Stopping, TokenId,
};
use shoal_draft::SharedCorpus;

use crate::speculation::Drafter;

/// One attempt at one sequence, as its router names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceKey {
    /// The router's session, numbered by the worker.
    pub session: u64,
    /// Unique within the session.
    pub sequence: u64,
    /// The router's attempt at this sequence.
    pub attempt: u32,
}

/// A sequence to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub key: SequenceKey,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Output already produced elsewhere: limits, penalties and noise go on from its end.
    pub resume: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When it ends.
    pub stopping: Stopping,
    /// What is reported about the tokens.
    pub scoring: Scoring,
    /// Whose pages it may share.
    pub namespace: Namespace,
    /// Higher runs first.
    pub priority: u32,
    /// When the answer is worthless.
    pub deadline: Option<Instant>,
    /// How it is drafted for.
    pub speculation: Speculation,
    /// Texts that may draft for it.
    pub corpora: Vec<(Drafter, SharedCorpus)>,
    /// It runs ahead of a sequence elsewhere: it rests so many tokens after the last one that it
    /// was told of, and ends only when it is ended.
    pub lead: Option<u32>,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The waiting queue is full.
    #[error("the waiting queue is full ({limit} sequences)")]
    Overloaded {
        /// Its size.
        limit: usize,
    },
    /// The engine takes no new sequences.
    #[error("draining")]
    Draining,
    /// A sequence of this name is in the engine.
    #[error("sequence {} of session {} is already here", .0.sequence, .0.session)]
    Duplicate(SequenceKey),
    /// The engine has stopped.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
    /// A parameter is outside its range.
    #[error(transparent)]
    Param(#[from] ParamError),
    /// A token of the prompt or of the resumed output is not in the vocabulary.
    #[error("token {token} is not in the vocabulary of {vocab}")]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Nothing to start from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt alone is longer than the context or the KV pool.
    #[error("the prompt has {tokens} tokens, {limit} fit")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Longest prompt.
        limit: usize,
    },
    /// It goes on from more output than it may have.
    #[error("the output so far has {tokens} tokens, {limit} are allowed")]
    OutputTooLong {
        /// Tokens of the output.
        tokens: usize,
        /// Longest output.
        limit: usize,
    },
}

impl SubmitError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Overloaded { .. } => Class::Backpressure,
            Self::Draining | Self::Stopped(_) => Class::Retry,
            _ => Class::Client,
        }
    }
}

/// Log-probability of one token, from the logits as the model made them.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// `None` where the token has no predecessor.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// A stop token; it is the last one reported.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// Its router cancelled it.
    Cancelled,
    /// Its deadline passed.
    Deadline,
    /// The engine gave it up: drained, or a step failed. It can be resumed elsewhere.
    Preempted,
}

/// What a sequence cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens found in the prefix cache at first admission.
    pub cached_tokens: u32,
    /// From submission to first admission.
    pub queued: Duration,
    /// From first admission to the first output token.
    pub prefill: Duration,
    /// Times it lost its pages and was computed again.
    pub preemptions: u32,
    /// Draft tokens that were verified.
    pub drafted: u32,
    /// Those that were right.
    pub accepted: u32,
}

/// What one step made for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceOutput {
    /// The sequence.
    pub key: SequenceKey,
    /// Absolute output position of the first of `tokens`.
    pub offset: u32,
    /// New output tokens; empty when only `finish` is news.
    pub tokens: Vec<TokenId>,
    /// One per token, where asked for.
    pub logprobs: Vec<Logprob>,
    /// One per prompt token, once, where asked for.
    pub prompt_logprobs: Vec<Logprob>,
    /// Set on the sequence's last output.
    pub finish: Option<(Finish, Usage)>,
}

/// How busy the engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Sequences holding pages.
    pub running: u32,
    /// Sequences waiting for their first step, or for their pages back.
    pub waiting: u32,
    /// Prompt tokens of the waiting that no page held when they began to wait.
    pub waiting_uncached_tokens: u64,
    /// Share of the pool's pages that sequences hold; cached free pages do not count. 0 to 1.
    pub kv_usage: f64,
    /// Prompt tokens computed per second of late, in steps that computed some.
    pub prefill_tps: f64,
    /// Output tokens made per second of late, in steps that made some.
    pub decode_tps: f64,
    /// Median step time of late, milliseconds.
    pub step_ms_p50: f64,
    /// 99th percentile of the same.
    pub step_ms_p99: f64,
    /// A step of n decode rows takes about base + n · row, in milliseconds; both 0 before that
    /// is known.
    pub step_base_ms: f64,
    /// See `step_base_ms`.
    pub step_row_ms: f64,
    /// What a prompt row adds to a step, in milliseconds; 0 before that is known.
    pub prompt_row_ms: f64,
    /// The chance that one more draft row must have to be worth its time; above 1, none is.
    pub draft_price: f64,
}

/// What became of a page of prompt tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageChange {
    /// It can be shared from now on.
    Stored(PageHash),
    /// It was evicted.
    Removed(PageHash),
}

/// Takes the output of each step. Called on the engine's thread: it must neither block nor
/// wait.
pub trait StepSink: Send {
    /// `outputs` may be drained; it is cleared afterwards. `step` rises by one each time.
    fn publish(&mut self, step: u64, outputs: &mut Vec<SequenceOutput>, load: &Load);

    /// What the step changed in the prefix cache, in order, if anything. A page is stored after
    /// its parent and removed before it.
    fn cached(&mut self, _changes: &[PageChange]) {}
}
