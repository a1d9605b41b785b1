//! From a request of the wire to a job that workers can take: defaults, limits, tokens.

use std::sync::Arc;

use shoal_core::{
    DraftScope, Namespace, Sampling, Scoring, Speculation, Stopping, Subject, TokenId,
};
use shoal_draft::Whose;
use shoal_proto::{
    inference::{
        self as api, GenerateRequest, generate_request::Prompt, speculation::Mode as Drafting,
    },
    worker as wire,
};
use shoal_text::{EncodeOptions, Message, StopMatcher};
use tokio::time::Instant;

use crate::{
    error::RequestError,
    keys::{Caller, Tenant},
    model::{Model, TextModel},
};

/// Most choices of one request.
const MAX_CHOICES: u32 = 16;
/// Longer text is handled off the async threads.
pub(crate) const LONG_TEXT: usize = 16 << 10;
/// Seeds drawn here survive a client that keeps numbers as IEEE doubles.
const SEED_BITS: u32 = 53;

/// How a request came in.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) caller: Caller,
    pub(crate) request_id: Arc<str>,
    pub(crate) at: Instant,
    pub(crate) deadline: Instant,
}

/// A validated request; its choices share it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) arrival: Arrival,
    pub(crate) model: Arc<Model>,
    pub(crate) prompt: Vec<TokenId>,
    /// The prompt's text, where it is part of the answer.
    pub(crate) echo: Option<String>,
    pub(crate) sampling: wire::Sampling,
    pub(crate) stopping: wire::Stopping,
    pub(crate) scoring: wire::Scoring,
    pub(crate) stops: Vec<String>,
    pub(crate) seed: u64,
    pub(crate) choices: u32,
    pub(crate) namespace: Namespace,
    pub(crate) priority: u32,
    pub(crate) session_id: String,
    pub(crate) speculation: Speculation,
    pub(crate) scopes: Scopes,
}

/// The scopes of text that may draft for a job, and that its answer adds to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scopes {
    pub(crate) tenant: DraftScope,
    /// Where the user is known.
    pub(crate) user: Option<DraftScope>,
    /// Who may have the answer forgotten.
    pub(crate) whose: Whose,
}

impl Scopes {
    fn new(model: &Model, caller: &Caller, salt: &str, user: &str) -> Self {
        let tokenizer = &model.description.tokenizer_sha256;
        let tenant = DraftScope::tenant(&model.name, tokenizer, &caller.tenant.name, salt);
        let user = if user.is_empty() { &caller.user } else { user };
        let is_known = !user.is_empty();
        Self {
            tenant,
            user: is_known.then(|| tenant.user(user)),
            whose: whose(&caller.tenant, user),
        }
    }
}

/// A user of a tenant; for an empty name, all of them.
pub(crate) fn whose(tenant: &Tenant, user: &str) -> Whose {
    let tenant = Subject::tenant(&tenant.name);
    Whose {
        tenant,
        user: (!user.is_empty()).then(|| tenant.user(user)),
    }
}

impl Job {
    /// Validates the request against the model and tokenizes its prompt.
    pub(crate) async fn new(
        request: GenerateRequest,
        arrival: Arrival,
        model: Arc<Model>,
        default_max_tokens: Option<u32>,
    ) -> Result<Self, RequestError> {
        if request.constraint.is_some_and(|c| c.constraint.is_some()) {
            return Err(RequestError::Unsupported {
                param: "constraint".into(),
            });
        }
        let asked = request.sampling.unwrap_or_default();
        let choices = asked.n.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&choices) {
            let message = format!("n must be in [1, {MAX_CHOICES}], not {choices}");
            return Err(RequestError::invalid("n", message));
        }
        let vocab = model.description.vocab_size;
        let seed = asked.seed.unwrap_or_else(draw_seed);
        let sampling = sampling(asked, seed);
        sampling.validate(vocab)?;

        let response = request.response.unwrap_or_default();
        let scoring = Scoring {
            output_top: response.logprobs.then_some(response.top_logprobs),
            prompt_top: (response.logprobs && response.echo).then_some(response.top_logprobs),
        };
        scoring.validate()?;

        let limits = request.stopping.unwrap_or_default();
        // Each choice makes its own later; a mistake shows here, before the queue.
        stop_matcher(&limits.stop)?;
        if limits.max_tokens == Some(0) && !response.echo {
            return Err(RequestError::invalid(
                "max_tokens",
                "max_tokens must be at least 1, unless the prompt is echoed",
            ));
        }

        let prompt = request
            .prompt
            .ok_or_else(|| RequestError::invalid("prompt", "there is no prompt"))?;
        let (prompt, echo) = tokenize(prompt, &model.text, response.echo).await?;
        check_prompt(&prompt, vocab)?;
        let stopping = stopping(&limits, &prompt, &model, default_max_tokens)?;

        let asked = api::Priority::try_from(request.priority)
            .map_err(|_| RequestError::invalid("priority", "priority is none of its values"))?;
        let tenant = &arrival.caller.tenant;
        let (salt, user) = (&request.cache_salt, &request.user);
        Ok(Self {
            scopes: Scopes::new(&model, &arrival.caller, salt, user),
            speculation: speculation(request.speculation)?,
            prompt,
            echo,
            sampling: to_wire(sampling),
            stopping: wire::Stopping {
                max_tokens: stopping.max_tokens,
                min_tokens: stopping.min_tokens,
                stop_token_ids: stopping.stop_tokens,
            },
            scoring: wire::Scoring {
                output_top: scoring.output_top,
                prompt_top: scoring.prompt_top,
            },
            stops: limits.stop,
            seed,
            choices,
            namespace: Namespace::new(&tenant.name, &request.cache_salt),
            priority: tenant.clamp(asked) as u32,
            session_id: request.session_id,
            model,
            arrival,
        })
    }
}

/// How a request is drafted for.
fn speculation(asked: Option<api::Speculation>) -> Result<Speculation, RequestError> {
    match asked.and_then(|asked| asked.mode) {
        None | Some(Drafting::Off(false)) => Ok(Speculation::Auto),
        Some(Drafting::Off(true)) => Ok(Speculation::Off),
        Some(Drafting::Rows(rows)) => Speculation::fixed(rows.into())
            .map_err(|error| RequestError::invalid("speculation", error.to_string())),
    }
}

/// Looks for stop strings; `None` where there are none.
pub(crate) fn stop_matcher(stops: &[String]) -> Result<Option<StopMatcher>, RequestError> {
    if stops.is_empty() {
        return Ok(None);
    }
    let matcher = StopMatcher::new(stops.to_vec());
    matcher
        .map(Some)
        .map_err(|error| RequestError::invalid("stop", error.to_string()))
}

/// A seed for a request that brings none.
pub(crate) fn draw_seed() -> u64 {
    rand::random::<u64>() >> (64 - SEED_BITS)
}

/// The API's defaults where the request is silent.
fn sampling(asked: api::Sampling, seed: u64) -> Sampling {
    let default = Sampling::default();
    let mut logit_bias: Vec<_> = asked.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    Sampling {
        temperature: asked.temperature.unwrap_or(default.temperature),
        top_p: asked.top_p.unwrap_or(default.top_p),
        top_k: asked.top_k.unwrap_or(default.top_k),
        min_p: asked.min_p.unwrap_or(default.min_p),
        presence_penalty: asked.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: asked.frequency_penalty.unwrap_or(default.frequency_penalty),
        repetition_penalty: asked
            .repetition_penalty
            .unwrap_or(default.repetition_penalty),
        logit_bias,
        seed,
        choice: 0,
    }
}

fn to_wire(sampling: Sampling) -> wire::Sampling {
    wire::Sampling {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        logit_bias: sampling.logit_bias.into_iter().collect(),
    }
}

fn check_prompt(prompt: &[TokenId], vocab: u32) -> Result<(), RequestError> {
    if prompt.is_empty() {
        return Err(RequestError::invalid("prompt", "the prompt is empty"));
    }
    match prompt.iter().find(|&&token| token >= vocab) {
        None => Ok(()),
        Some(token) => Err(RequestError::invalid(
            "prompt",
            format!("token {token} is not in the vocabulary of {vocab}"),
        )),
    }
}

/// Limits of the output, clamped to the room that the prompt leaves.
fn stopping(
    asked: &api::Stopping,
    prompt: &[TokenId],
    model: &Model,
    default_max_tokens: Option<u32>,
) -> Result<Stopping, RequestError> {
    let context = model.context();
    let room = context.saturating_sub(prompt.len() as u32);
    let max_tokens = asked
        .max_tokens
        .or(default_max_tokens)
        .unwrap_or(room.max(1));
    let too_long = RequestError::ContextLength {
        tokens: prompt.len(),
        limit: context,
    };
    if prompt.len() > context as usize || (room == 0 && max_tokens > 0) {
        return Err(too_long);
    }
    let mut stop_tokens = asked.stop_token_ids.clone();
    if !asked.ignore_eos {
        stop_tokens.extend(model.text.tokenizer.end_tokens());
    }
    stop_tokens.sort_unstable();
    stop_tokens.dedup();
    let min_tokens = asked.min_tokens.unwrap_or(0);
    let asked = Stopping {
        max_tokens,
        min_tokens,
        stop_tokens,
    };
    asked.validate(model.description.vocab_size)?;
    let max_tokens = max_tokens.min(room);
    Ok(Stopping {
        max_tokens,
        min_tokens: min_tokens.min(max_tokens),
        ..asked
    })
}

/// The prompt's tokens, and its text if it is to be echoed.
async fn tokenize(
    prompt: Prompt,
    text: &Arc<TextModel>,
    echo: bool,
) -> Result<(Vec<TokenId>, Option<String>), RequestError> {
    let size = match &prompt {
        Prompt::Text(text) => text.len(),
        Prompt::TokenIds(_) => 0,
        Prompt::Chat(chat) => chat.messages.iter().map(|m| m.content.len()).sum(),
    };
    let text = text.clone();
    off_thread(size, move || to_tokens(prompt, &text, echo)).await
}

/// Runs `work` here, or on a blocking thread where it handles many bytes.
pub(crate) async fn off_thread<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, RequestError> + Send + 'static,
) -> Result<T, RequestError> {
    if bytes <= LONG_TEXT {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(_) => Err(RequestError::Draining),
        },
    }
}

fn to_tokens(
    prompt: Prompt,
    text: &TextModel,
    echo: bool,
) -> Result<(Vec<TokenId>, Option<String>), RequestError> {
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    let prompt = match prompt {
        Prompt::TokenIds(tokens) => {
            let echoed = echo.then(|| text.tokenizer.decode(&tokens.ids));
            return Ok((tokens.ids, echoed));
        }
        Prompt::Text(prompt) => prompt,
        Prompt::Chat(chat) => render(chat, text)?,
    };
    let tokens = text.tokenizer.encode(&prompt, options)?;
    Ok((tokens, echo.then_some(prompt)))
}

fn render(chat: api::ChatPrompt, text: &TextModel) -> Result<String, RequestError> {
    if chat.messages.is_empty() {
        return Err(RequestError::invalid(
            "messages",
            "messages must not be empty",
        ));
    }
    let messages: Vec<Message> = chat
        .messages
        .into_iter()
        .map(|m| Message {
            role: m.role,
            content: m.content,
            name: Some(m.name).filter(|name| !name.is_empty()),
        })
        .collect();
    Ok(text
        .template()?
        .render(&messages, chat.add_generation_prompt.unwrap_or(true))?)
}
