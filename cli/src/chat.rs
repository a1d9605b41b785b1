//! `shoal chat`: a conversation in the terminal, over gRPC.

use std::io::{self, IsTerminal, Write};

use clap::Args;
use shoal_proto::inference::inference_client::InferenceClient;
use shoal_proto::inference::{
    ChatMessage, ChatPrompt, GenerateChunk, GenerateRequest, Sampling, Stopping, generate_request,
};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader, Lines};
use tonic::Request;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use crate::client::{Bearer, ClientArgs, ClientError};

/// What to do in the conversation; printed at its start.
const HELP: &str = "/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer";

/// Options of `shoal chat`.
#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// Model to ask; needed only where the router serves several
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// System message at the start of the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Randomness of the answers; 0 always takes the likeliest token [default: the router's]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,

    /// Draw from the likeliest tokens that hold this share of the probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,

    /// Draw from this many likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,

    /// Drop tokens less likely than this share of the likeliest
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,

    /// Divides the logits of tokens that occurred already
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,

    /// Longest answer in tokens [default: what the context holds]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,

    /// Makes the answers reproducible
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
}

/// Why a conversation ended badly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChatError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the request was refused")]
    Refused(#[source] Box<tonic::Status>),
    #[error("the terminal cannot be used")]
    Terminal(#[from] io::Error),
}

impl ChatError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> shoal_core::Class {
        match self {
            Self::Client(error) => error.class(),
            Self::Refused(status) => crate::client::status_class(status),
            Self::Terminal(_) => shoal_core::Class::Fatal,
        }
    }
}

type Client = InferenceClient<InterceptedService<Channel, Bearer>>;

/// Runs the conversation until its input ends.
pub(crate) async fn run(args: ChatArgs) -> Result<(), ChatError> {
    let client = InferenceClient::new(args.client.connect().await?);
    let interactive = io::stdin().is_terminal();
    let mut chat = Chat::new(client, args);
    if interactive {
        eprintln!("{HELP}");
    }
    chat.converse(BufReader::new(tokio::io::stdin()).lines(), interactive)
        .await
}

struct Chat {
    client: Client,
    args: ChatArgs,
    history: Vec<ChatMessage>,
    session: String,
}

impl Chat {
    fn new(client: Client, args: ChatArgs) -> Self {
        let session = format!("chat-{:016x}", rand::random::<u64>());
        let mut chat = Self {
            client,
            args,
            history: Vec::new(),
            session,
        };
        chat.reset();
        chat
    }

    fn reset(&mut self) {
        self.history.clear();
        if let Some(system) = &self.args.system {
            self.history.push(message("system", system));
        }
    }

    async fn converse(
        &mut self,
        mut lines: Lines<impl AsyncRead + AsyncBufReadExt + Unpin>,
        interactive: bool,
    ) -> Result<(), ChatError> {
        loop {
            if interactive {
                eprint!("> ");
            }
            let line = tokio::select! {
                line = lines.next_line() => line?,
                // Nothing to stop: Ctrl-C at the prompt ends the conversation.
                _ = tokio::signal::ctrl_c() => None,
            };
            let Some(line) = line else {
                if interactive {
                    eprintln!();
                }
                return Ok(());
            };
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/reset" => self.reset(),
                "/help" => eprintln!("{HELP}"),
                prompt => match self.answer(prompt).await {
                    // A person can go on after a refusal; a script must see it.
                    Err(error) if interactive => eprintln!("error: {}", crate::chain(&error)),
                    result => result?,
                },
            }
        }
    }

    /// Asks, prints the answer as it grows, and keeps both in the history.
    async fn answer(&mut self, prompt: &str) -> Result<(), ChatError> {
        self.history.push(message("user", prompt));
        let mut answer = String::new();
        let result = self.stream(&mut answer).await;
        println!();
        if result.is_err() {
            self.history.pop();
        } else {
            self.history.push(message("assistant", &answer));
        }
        result
    }

    async fn stream(&mut self, answer: &mut String) -> Result<(), ChatError> {
        let refused = |status| ChatError::Refused(Box::new(status));
        let request = Request::new(self.request());
        let stop = tokio::signal::ctrl_c();
        tokio::pin!(stop);
        let response = tokio::select! {
            response = self.client.generate_stream(request) => response.map_err(refused)?,
            _ = &mut stop => return Ok(()),
        };
        let mut chunks = response.into_inner();
        loop {
            // Leaving drops the stream, which cancels the request.
            let chunk: Option<GenerateChunk> = tokio::select! {
                chunk = chunks.message() => chunk.map_err(refused)?,
                _ = &mut stop => return Ok(()),
            };
            let Some(chunk) = chunk else {
                return Ok(());
            };
            answer.push_str(&chunk.text);
            let mut out = io::stdout().lock();
            out.write_all(chunk.text.as_bytes())?;
            out.flush()?;
        }
    }

    fn request(&self) -> GenerateRequest {
        let args = &self.args;
        GenerateRequest {
            model: args.model.clone().unwrap_or_default(),
            prompt: Some(generate_request::Prompt::Chat(ChatPrompt {
                messages: self.history.clone(),
                add_generation_prompt: None,
            })),
            sampling: Some(Sampling {
                temperature: args.temperature,
                top_p: args.top_p,
                top_k: args.top_k,
                min_p: args.min_p,
                repetition_penalty: args.repetition_penalty,
                seed: args.seed,
                ..Sampling::default()
            }),
            stopping: Some(Stopping {
                max_tokens: args.max_tokens,
                ..Stopping::default()
            }),
            session_id: self.session.clone(),
            ..GenerateRequest::default()
        }
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        name: String::new(),
    }
}
