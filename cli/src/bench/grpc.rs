//! Load over gRPC.

use std::time::Instant;

use shoal_proto::inference::inference_client::InferenceClient;
use shoal_proto::inference::{
    ChatMessage, ChatPrompt, GenerateRequest, Sampling, Stopping, generate_request,
};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::prompts::Prompt;
use super::report::{Counts, Record, Stopwatch};
use super::{BenchError, ServeArgs};
use crate::client::Bearer;

/// A router.
pub(super) struct Target {
    client: InferenceClient<InterceptedService<Channel, Bearer>>,
    /// Every request, but for its prompt.
    request: GenerateRequest,
}

impl Target {
    pub(super) async fn connect(args: &ServeArgs) -> Result<Self, BenchError> {
        Ok(Self {
            client: InferenceClient::new(args.client.connect().await?),
            request: GenerateRequest {
                model: args.model.clone(),
                sampling: Some(Sampling {
                    temperature: Some(args.temperature),
                    seed: Some(args.seed),
                    ..Sampling::default()
                }),
                stopping: Some(Stopping {
                    max_tokens: Some(args.max_tokens),
                    ignore_eos: args.ignore_eos,
                    ..Stopping::default()
                }),
                ..GenerateRequest::default()
            },
        })
    }

    pub(super) async fn ask(&self, prompt: &Prompt) -> Result<Record, BenchError> {
        let failed = |status| BenchError::Grpc(Box::new(status));
        let request = GenerateRequest {
            prompt: Some(encode(prompt)),
            ..self.request.clone()
        };
        let mut client = self.client.clone();
        let mut watch = Stopwatch::start();
        let response = client.generate_stream(request).await.map_err(failed)?;
        let mut chunks = response.into_inner();
        let mut counts = None;
        while let Some(chunk) = chunks.message().await.map_err(failed)? {
            if !chunk.text.is_empty() {
                watch.text(Instant::now());
            }
            if let Some(usage) = chunk.usage {
                counts = Some(Counts {
                    prompt: usage.prompt_tokens,
                    completion: usage.completion_tokens,
                    cached: usage.cached_tokens,
                });
            }
        }
        watch.finish(Instant::now(), counts)
    }
}

fn encode(prompt: &Prompt) -> generate_request::Prompt {
    match prompt {
        Prompt::Text { prompt } => generate_request::Prompt::Text(prompt.clone()),
        Prompt::Chat { messages } => {
            let messages = messages.iter().map(|message| ChatMessage {
                role: message.role.clone(),
                content: message.content.clone(),
                name: String::new(),
            });
            generate_request::Prompt::Chat(ChatPrompt {
                messages: messages.collect(),
                add_generation_prompt: None,
            })
        }
    }
}
