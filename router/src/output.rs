//! From a choice's tokens to its text, up to a stop string.

use std::{collections::VecDeque, sync::Arc};

use shoal_core::TokenId;
use shoal_proto::{
    inference::{FinishReason, TokenLogprob, TopLogprob},
    worker::Logprob,
};
use shoal_text::{Detokenizer, StopMatcher};

use crate::{
    answer::Growth,
    error::RequestError,
    generation::Tokens,
    model::Model,
    request::{Job, stop_matcher},
};

/// A token that waits for its text: the stop strings may still take it back.
#[derive(Debug)]
struct Held {
    token: TokenId,
    logprob: Option<TokenLogprob>,
    /// Its place in the text, in bytes.
    start: usize,
    end: usize,
}

/// The text side of one choice.
pub(crate) struct Output {
    job: Arc<Job>,
    detokenizer: Detokenizer,
    stops: Option<StopMatcher>,
    echo: bool,
    held: VecDeque<Held>,
    /// Bytes of text made and let go.
    made: usize,
    released: usize,
    completion_tokens: u32,
    piece: String,
}

impl Output {
    pub(crate) fn new(job: &Arc<Job>) -> Result<Self, RequestError> {
        let tokenizer = &job.model.text.tokenizer;
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer, job.prompt.last().copied()),
            stops: stop_matcher(&job.stops)?,
            echo: job.echo.is_some(),
            held: VecDeque::new(),
            made: 0,
            released: 0,
            completion_tokens: 0,
            piece: String::new(),
            job: job.clone(),
        })
    }

    /// Output tokens so far, with those that are not part of the text.
    pub(crate) fn completion_tokens(&self) -> u32 {
        self.completion_tokens
    }

    /// What `news` adds to choice `index`.
    pub(crate) fn push(&mut self, index: u32, news: Tokens) -> Growth {
        let mut growth = Growth {
            index,
            ..Growth::default()
        };
        if std::mem::take(&mut self.echo) {
            self.echo_prompt(news.prompt_logprobs, &mut growth);
        }
        let stopped = news.end.is_some_and(|end| end.stopped);
        let last = news.tokens.len().saturating_sub(1);
        let mut logprobs = news.logprobs.into_iter();
        for (i, token) in news.tokens.into_iter().enumerate() {
            self.completion_tokens += 1;
            let logprob = logprobs.next();
            if stopped && i == last {
                // The stop token ends the text and is no part of it.
                break;
            }
            self.piece.clear();
            self.detokenizer.push(token, &mut self.piece);
            let start = self.made;
            self.made += self.piece.len();
            self.held.push_back(Held {
                token,
                logprob: logprob.map(|l| token_logprob(&self.job.model, token, l)),
                start,
                end: self.made,
            });
            if self.release(&mut growth) {
                return growth;
            }
        }
        if news.end.is_some() {
            self.piece.clear();
            self.detokenizer.finish(&mut self.piece);
            if self.release(&mut growth) {
                return growth;
            }
            if let Some(stops) = &mut self.stops {
                stops.finish(&mut growth.text);
            }
            self.let_go(usize::MAX, &mut growth);
            growth.finish = Some(if stopped {
                FinishReason::Stop
            } else {
                FinishReason::Length
            });
        }
        growth
    }

    /// Moves `piece` through the stop strings into the growth. True: one has ended the choice.
    fn release(&mut self, growth: &mut Growth) -> bool {
        let before = growth.text.len();
        // As with stop tokens, stop strings count after min_tokens only.
        let armed = self.completion_tokens > self.job.stopping.min_tokens;
        let stops = self.stops.as_mut().filter(|_| armed);
        let Some(stops) = stops else {
            growth.text.push_str(&self.piece);
            self.released += growth.text.len() - before;
            let all = self.released;
            self.let_go(all, growth);
            return false;
        };
        let matched = stops.push(&self.piece, &mut growth.text);
        growth.stop = stops.matched().map(str::to_owned);
        self.released += growth.text.len() - before;
        let released = self.released;
        if !matched {
            self.let_go(released, growth);
            return false;
        }
        // A token that reaches over the cut has given the text its beginning.
        while self.held.front().is_some_and(|held| held.start < released) {
            self.let_go_first(growth);
        }
        self.held.clear();
        growth.finish = Some(FinishReason::Stop);
        true
    }

    /// Lets the tokens go whose text is out up to `end`.
    fn let_go(&mut self, end: usize, growth: &mut Growth) {
        while self.held.front().is_some_and(|held| held.end <= end) {
            self.let_go_first(growth);
        }
    }

    fn let_go_first(&mut self, growth: &mut Growth) {
        if let Some(held) = self.held.pop_front() {
            growth.token_ids.push(held.token);
            growth.logprobs.extend(held.logprob);
        }
    }

    fn echo_prompt(&self, logprobs: Vec<Logprob>, growth: &mut Growth) {
        let job = &self.job;
        growth.text = job.echo.clone().unwrap_or_default();
        growth.token_ids.clone_from(&job.prompt);
        let pairs = job.prompt.iter().zip(logprobs);
        growth.logprobs = pairs
            .map(|(&token, logprob)| token_logprob(&job.model, token, logprob))
            .collect();
    }
}

fn token_logprob(model: &Model, token: TokenId, logprob: Logprob) -> TokenLogprob {
    let bytes = |token| model.text.tokenizer.token_bytes(token).to_vec();
    let top = logprob.top_tokens.into_iter().zip(logprob.top_logprobs);
    TokenLogprob {
        token_id: token,
        token: bytes(token),
        logprob: logprob.logprob,
        top: top
            .map(|(token_id, logprob)| TopLogprob {
                token_id,
                token: bytes(token_id),
                logprob,
            })
            .collect(),
        unscored: logprob.unscored,
    }
}

#[cfg(test)]
mod tests;
