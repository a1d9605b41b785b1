//! The body of OpenAI's generation requests, and its translation to the native form.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Number, Value};
use shoal_proto::inference::{
    self as native, ChatMessage, ChatPrompt, GenerateRequest, ResponseOptions, Sampling, Stopping,
    generate_request::Prompt, speculation::Mode,
};

use crate::error::RequestError;

/// Output tokens of a completion without a limit, as OpenAI documents it.
const COMPLETION_MAX_TOKENS: u32 = 16;
/// Most prompts of one completion request.
const MAX_PROMPTS: usize = 64;

/// The fields of `/v1/chat/completions` and `/v1/completions`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Body {
    model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Prompts>,
    pub(super) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    seed: Option<Number>,
    n: Option<u32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<HashMap<String, f32>>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    min_tokens: Option<u32>,
    stop: Option<OneOrMany>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<u32>,
    echo: Option<bool>,
    add_generation_prompt: Option<bool>,
    priority: Option<Priority>,
    session_id: Option<String>,
    cache_salt: Option<String>,
    user: Option<String>,
    speculation: Option<Speculation>,
    // Known and not built.
    tools: Option<Value>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    function_call: Option<Value>,
    response_format: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    prediction: Option<Value>,
    web_search_options: Option<Value>,
    suffix: Option<String>,
    best_of: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tool_calls: Option<Value>,
    #[serde(default)]
    function_call: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a string or an array of content parts is expected"
)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    #[serde(default)]
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or an array of strings is expected")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a string, an array of strings, or one or several arrays of token ids are expected"
)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a boolean (chat) or a number (completions) is expected"
)]
enum Logprobs {
    Wanted(bool),
    Top(u32),
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Priority {
    Bulk,
    Default,
    Interactive,
}

/// `"auto"`, `"off"`, or a number of draft tokens.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "auto, off or a number is expected")]
enum Speculation {
    Rows(u64),
    Name(String),
}

impl Speculation {
    fn into_native(self) -> Result<Option<native::Speculation>, RequestError> {
        let parsed = match self {
            Self::Rows(rows) => shoal_core::Speculation::fixed(rows),
            Self::Name(name) => name.parse(),
        };
        let parsed = parsed.map_err(|e| RequestError::invalid("speculation", e.to_string()))?;
        let mode = match parsed {
            shoal_core::Speculation::Auto => None,
            shoal_core::Speculation::Off => Some(Mode::Off(true)),
            shoal_core::Speculation::Fixed(rows) => Some(Mode::Rows(rows)),
        };
        Ok(Some(native::Speculation { mode }))
    }
}

fn invalid(param: &'static str, message: &'static str) -> RequestError {
    RequestError::invalid(param, message)
}

impl Body {
    /// Whether a usage chunk ends the stream.
    pub(super) fn include_usage(&self) -> bool {
        self.stream_options
            .as_ref()
            .is_some_and(|o| o.include_usage)
    }

    /// The caller's name for the end user.
    pub(super) fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The request of a chat.
    pub(super) fn into_chat(mut self) -> Result<GenerateRequest, RequestError> {
        self.check_supported()?;
        let messages = self
            .messages
            .take()
            .ok_or_else(|| invalid("messages", "messages is required"))?;
        let messages: Result<Vec<ChatMessage>, _> = messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| message.into_native(i))
            .collect();
        let prompt = Prompt::Chat(ChatPrompt {
            messages: messages?,
            add_generation_prompt: self.add_generation_prompt,
        });
        let logprobs = match self.logprobs {
            None => false,
            Some(Logprobs::Wanted(wanted)) => wanted,
            Some(Logprobs::Top(_)) => {
                return Err(invalid(
                    "logprobs",
                    "logprobs must be a boolean: use top_logprobs",
                ));
            }
        };
        if self.top_logprobs.is_some() && !logprobs {
            return Err(invalid("top_logprobs", "top_logprobs needs logprobs: true"));
        }
        let response = ResponseOptions {
            logprobs,
            top_logprobs: self.top_logprobs.unwrap_or(0),
            echo: false,
        };
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        self.into_native(prompt, response, max_tokens)
    }

    /// The requests of a completion, one per prompt.
    pub(super) fn into_completions(
        mut self,
        has_default_max_tokens: bool,
    ) -> Result<Vec<GenerateRequest>, RequestError> {
        self.check_supported()?;
        let prompts = match self.prompt.take() {
            None => return Err(invalid("prompt", "prompt is required")),
            Some(Prompts::Text(text)) => vec![Prompt::Text(text)],
            Some(Prompts::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
            Some(Prompts::Tokens(ids)) => vec![token_ids(ids)],
            Some(Prompts::TokenLists(lists)) => lists.into_iter().map(token_ids).collect(),
        };
        if !(1..=MAX_PROMPTS).contains(&prompts.len()) {
            let message = format!("prompt must hold 1 to {MAX_PROMPTS} prompts");
            return Err(RequestError::invalid("prompt", message));
        }
        let top = match self.logprobs {
            None | Some(Logprobs::Wanted(false)) => None,
            Some(Logprobs::Top(top)) => Some(top),
            Some(Logprobs::Wanted(true)) => {
                return Err(invalid("logprobs", "logprobs must be a number"));
            }
        };
        let response = ResponseOptions {
            logprobs: top.is_some(),
            top_logprobs: top.unwrap_or(0),
            echo: self.echo.unwrap_or(false),
        };
        let default = (!has_default_max_tokens).then_some(COMPLETION_MAX_TOKENS);
        let max_tokens = self.max_tokens.or(self.max_completion_tokens).or(default);
        // The seed is drawn once: every prompt of the request reports the same one.
        let mut request = self.into_native(Prompt::Text(String::new()), response, max_tokens)?;
        if prompts.len() > 1 {
            let sampling = request.sampling.get_or_insert_default();
            sampling.seed.get_or_insert_with(crate::request::draw_seed);
        }
        let requests = prompts.into_iter().map(|prompt| GenerateRequest {
            prompt: Some(prompt),
            ..request.clone()
        });
        Ok(requests.collect())
    }

    /// Refuses what would change the answer and is not built.
    fn check_supported(&self) -> Result<(), RequestError> {
        let asks = |value: &Option<Value>, harmless: &[Value]| {
            value
                .as_ref()
                .is_some_and(|v| !v.is_null() && !harmless.contains(v))
        };
        let empty = Value::Array(Vec::new());
        let format = serde_json::json!({"type": "text"});
        let text = serde_json::json!(["text"]);
        let single = self.n.unwrap_or(1);
        for (param, asked) in [
            ("tools", asks(&self.tools, std::slice::from_ref(&empty))),
            (
                "tool_choice",
                asks(&self.tool_choice, &["none".into(), "auto".into()]),
            ),
            ("functions", asks(&self.functions, &[empty])),
            (
                "function_call",
                asks(&self.function_call, &["none".into(), "auto".into()]),
            ),
            ("response_format", asks(&self.response_format, &[format])),
            ("modalities", asks(&self.modalities, &[text])),
            ("audio", asks(&self.audio, &[])),
            ("prediction", asks(&self.prediction, &[])),
            ("web_search_options", asks(&self.web_search_options, &[])),
            (
                "suffix",
                self.suffix.as_ref().is_some_and(|s| !s.is_empty()),
            ),
            (
                "best_of",
                self.best_of.is_some_and(|best_of| best_of != single),
            ),
        ] {
            if asked {
                return Err(RequestError::Unsupported {
                    param: param.into(),
                });
            }
        }
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(invalid(
                "stream_options",
                "stream_options needs stream: true",
            ));
        }
        Ok(())
    }

    fn into_native(
        self,
        prompt: Prompt,
        response: ResponseOptions,
        max_tokens: Option<u32>,
    ) -> Result<GenerateRequest, RequestError> {
        Ok(GenerateRequest {
            model: self.model.unwrap_or_default(),
            request_id: String::new(),
            prompt: Some(prompt),
            sampling: Some(Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                seed: self.seed.as_ref().map(seed).transpose()?,
                n: self.n,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                repetition_penalty: self.repetition_penalty,
                logit_bias: self
                    .logit_bias
                    .map(logit_bias)
                    .transpose()?
                    .unwrap_or_default(),
            }),
            stopping: Some(Stopping {
                max_tokens,
                min_tokens: self.min_tokens,
                stop: match self.stop {
                    None => Vec::new(),
                    Some(OneOrMany::One(stop)) => vec![stop],
                    Some(OneOrMany::Many(stops)) => stops,
                },
                stop_token_ids: self.stop_token_ids.unwrap_or_default(),
                ignore_eos: self.ignore_eos.unwrap_or(false),
            }),
            constraint: None,
            response: Some(response),
            priority: match self.priority {
                None => native::Priority::Unspecified,
                Some(Priority::Bulk) => native::Priority::Bulk,
                Some(Priority::Default) => native::Priority::Default,
                Some(Priority::Interactive) => native::Priority::Interactive,
            } as i32,
            session_id: self.session_id.unwrap_or_default(),
            cache_salt: self.cache_salt.unwrap_or_default(),
            speculation: match self.speculation {
                None => None,
                Some(speculation) => speculation.into_native()?,
            },
            user: self.user.unwrap_or_default(),
        })
    }
}

impl Message {
    fn into_native(self, index: usize) -> Result<ChatMessage, RequestError> {
        let param = |field: &str| format!("messages[{index}].{field}");
        let given = |value: &Option<Value>| value.as_ref().is_some_and(|v| !v.is_null());
        for (field, asked) in [
            ("tool_calls", given(&self.tool_calls)),
            ("function_call", given(&self.function_call)),
        ] {
            if asked {
                return Err(RequestError::Unsupported {
                    param: param(field).into(),
                });
            }
        }
        let role = match self.role.as_str() {
            "system" | "user" | "assistant" => self.role,
            // OpenAI's newer name for it; templates know the older one.
            "developer" => "system".to_owned(),
            "tool" | "function" => {
                return Err(RequestError::Unsupported {
                    param: param("role").into(),
                });
            }
            other => {
                let message = format!("{other:?} is no role: system, user or assistant");
                return Err(RequestError::invalid(param("role"), message));
            }
        };
        let content = match self.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => join(parts, index)?,
            None => {
                return Err(RequestError::invalid(
                    param("content"),
                    "a message needs content",
                ));
            }
        };
        Ok(ChatMessage {
            role,
            content,
            name: self.name.unwrap_or_default(),
        })
    }
}

/// The texts of content parts, one after the other.
fn join(parts: Vec<Part>, index: usize) -> Result<String, RequestError> {
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let param = |field: &str| format!("messages[{index}].content[{i}].{field}");
        if part.r#type != "text" {
            return Err(RequestError::Unsupported {
                param: param("type").into(),
            });
        }
        let Some(piece) = part.text else {
            return Err(RequestError::invalid(
                param("text"),
                "a text part needs text",
            ));
        };
        text.push_str(&piece);
    }
    Ok(text)
}

fn token_ids(ids: Vec<u32>) -> Prompt {
    Prompt::TokenIds(native::TokenIds { ids })
}

/// Any 64-bit integer; negative ones by their bits.
fn seed(number: &Number) -> Result<u64, RequestError> {
    number
        .as_u64()
        .or_else(|| number.as_i64().map(i64::cast_unsigned))
        .ok_or_else(|| {
            RequestError::invalid("seed", format!("seed must be an integer, not {number}"))
        })
}

fn logit_bias(bias: HashMap<String, f32>) -> Result<HashMap<u32, f32>, RequestError> {
    let entry = |(key, value): (String, f32)| match key.parse() {
        Ok(token) => Ok((token, value)),
        Err(_) => {
            let message = format!("logit_bias has the key {key:?}, which is no token id");
            Err(RequestError::invalid("logit_bias", message))
        }
    };
    bias.into_iter().map(entry).collect()
}
