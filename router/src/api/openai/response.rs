//! OpenAI's response objects.

use std::borrow::Cow;

use serde::{Serialize, Serializer, ser::SerializeMap};
use shoal_proto::inference::{self as native, FinishReason, TokenLogprob};

use crate::answer::Growth;

/// OpenAI's stand-in for minus infinity.
const LEAST_LOGPROB: f32 = -9999.0;

/// The object of a whole answer.
#[derive(Debug, Serialize)]
pub(super) struct Completion<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<C>,
    pub(super) usage: Usage,
    pub(super) seed: u64,
}

/// The object of one streamed event.
#[derive(Debug, Serialize)]
pub(super) struct Chunk<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: &'a [C],
    /// Inner `None` is OpenAI's `null` before the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl Usage {
    /// Adds the usage of one prompt's answer.
    pub(super) fn add(&mut self, usage: &native::Usage) {
        self.prompt_tokens += usage.prompt_tokens;
        self.completion_tokens += usage.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
        self.prompt_tokens_details.cached_tokens += usage.cached_tokens;
    }
}

/// OpenAI's name of a finish reason.
pub(super) fn finish_name(finish: FinishReason) -> Option<&'static str> {
    match finish {
        FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::Unspecified => None,
    }
}

#[derive(Debug, Serialize)]
pub(super) struct ChatChoice {
    pub(super) index: u32,
    pub(super) message: ChatMessage,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatMessage {
    pub(super) role: &'static str,
    pub(super) content: String,
    pub(super) refusal: Option<()>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatDelta<'a> {
    pub(super) index: u32,
    pub(super) delta: Delta<'a>,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<&'a str>,
}

/// The log-probabilities of a chat.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ScoredToken,
    top_logprobs: Vec<ScoredToken>,
}

#[derive(Debug, Serialize)]
struct ScoredToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ScoredToken {
    fn new(bytes: &[u8], logprob: f32) -> Self {
        Self {
            token: String::from_utf8_lossy(bytes).into_owned(),
            logprob: finite(logprob),
            bytes: bytes.to_vec(),
        }
    }
}

fn finite(logprob: f32) -> f32 {
    // Also for NaN.
    logprob.max(LEAST_LOGPROB)
}

impl ChatLogprobs {
    pub(super) fn new(tokens: &[TokenLogprob]) -> Self {
        let content = tokens.iter().map(|t| ChatToken {
            token: ScoredToken::new(&t.token, t.logprob),
            top_logprobs: t
                .top
                .iter()
                .map(|t| ScoredToken::new(&t.token, t.logprob))
                .collect(),
        });
        Self {
            content: content.collect(),
            refusal: None,
        }
    }
}

/// A choice of a completion, whole or in part.
#[derive(Debug, Serialize)]
pub(super) struct TextChoice<'a> {
    pub(super) text: Cow<'a, str>,
    pub(super) index: u32,
    pub(super) logprobs: Option<TextLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
}

/// The log-probabilities of a completion.
#[derive(Debug, Default, Serialize)]
pub(super) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopTokens>>,
    text_offset: Vec<usize>,
}

/// A map from tokens to log-probabilities, best first.
#[derive(Debug)]
struct TopTokens(Vec<(String, f32)>);

impl Serialize for TopTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl TextLogprobs {
    /// `offset` is where the tokens start in the choice's text, in characters, and moves on.
    pub(super) fn new(tokens: &[TokenLogprob], offset: &mut usize) -> Self {
        let mut new = Self::default();
        for t in tokens {
            new.tokens.push(token_name(&t.token));
            new.token_logprobs
                .push((!t.unscored).then(|| finite(t.logprob)));
            let top = t
                .top
                .iter()
                .map(|t| (token_name(&t.token), finite(t.logprob)));
            new.top_logprobs
                .push((!t.unscored).then(|| TopTokens(top.collect())));
            new.text_offset.push(*offset);
            // Continuation bytes belong to the character before them.
            *offset += t.token.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
        }
        new
    }
}

/// A token's text, or its bytes as OpenAI writes them where it is no text.
fn token_name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

/// One choice, put together from its growths.
#[derive(Clone, Debug, Default)]
pub(super) struct Whole {
    pub(super) text: String,
    pub(super) logprobs: Vec<TokenLogprob>,
    pub(super) finish: FinishReason,
}

impl Whole {
    pub(super) fn add(&mut self, growth: Growth) {
        self.text.push_str(&growth.text);
        self.logprobs.extend(growth.logprobs);
        if let Some(finish) = growth.finish {
            self.finish = finish;
        }
    }
}
