//! A router that answers by rote.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use shoal_proto::inference::inference_server::{Inference, InferenceServer};
use shoal_proto::inference::*;
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What the router was asked: the credentials and the request.
pub(crate) type Asked = Arc<Mutex<Vec<(Option<String>, GenerateRequest)>>>;

/// Answers each request with `You said: ` and the last message, a word a chunk.
#[derive(Clone, Default)]
pub(crate) struct Echo {
    asked: Asked,
}

/// Starts an [`Echo`]; its URL and what it was asked.
pub(crate) async fn echo() -> (String, Asked) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let echo = Echo::default();
    let asked = echo.asked.clone();
    let server = tonic::transport::Server::builder().add_service(InferenceServer::new(echo));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (url, asked)
}

#[tonic::async_trait]
impl Inference for Echo {
    type GenerateStreamStream = Pin<Box<dyn Stream<Item = Result<GenerateChunk, Status>> + Send>>;

    async fn generate_stream(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let key = request.metadata().get("authorization");
        let key = key.map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        self.asked.lock().unwrap().push((key, request.clone()));
        let said = match request.prompt {
            Some(generate_request::Prompt::Chat(chat)) => {
                chat.messages.last().unwrap().content.clone()
            }
            Some(generate_request::Prompt::Text(text)) => text,
            _ => return Err(Status::invalid_argument("no prompt")),
        };
        if said == "refuse" {
            return Err(Status::resource_exhausted("the queue is full"));
        }
        let text = format!("You said: {said}");
        let mut chunks: Vec<_> = text
            .split_inclusive(' ')
            .map(|word| GenerateChunk {
                text: word.to_owned(),
                ..GenerateChunk::default()
            })
            .collect();
        chunks.push(GenerateChunk {
            finish_reason: FinishReason::Stop.into(),
            usage: Some(Usage {
                prompt_tokens: 10,
                completion_tokens: 5,
                cached_tokens: 4,
            }),
            ..GenerateChunk::default()
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(
            chunks.into_iter().map(Ok),
        ))))
    }

    async fn generate(
        &self,
        _: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        Err(Status::unimplemented("not asked by the clients"))
    }

    async fn tokenize(
        &self,
        _: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        Err(Status::unimplemented("not asked by the clients"))
    }

    async fn detokenize(
        &self,
        _: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        Err(Status::unimplemented("not asked by the clients"))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Err(Status::unimplemented("not asked by the clients"))
    }
}
