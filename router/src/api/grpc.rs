//! The native door: `shoal.inference.v1`.

use std::{sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream::BoxStream};
use http::HeaderMap;
use shoal_proto::inference::{
    Choice, DetokenizeRequest, DetokenizeResponse, GenerateChunk, GenerateRequest,
    GenerateResponse, ListModelsRequest, ListModelsResponse, Model, TokenizeRequest,
    TokenizeResponse, inference_server::Inference,
};
use shoal_text::EncodeOptions;
use tonic::{Request, Response, Status};

use super::{admin, context::Context};
use crate::{answer::Answer, error::RequestError, service::Service};

/// The gRPC service.
#[derive(Debug)]
pub(crate) struct Grpc(pub(super) Arc<Service>);

impl Grpc {
    fn context<T>(&self, request: &mut Request<T>) -> Result<Context, RequestError> {
        let context = request.extensions_mut().remove::<Context>();
        let context = context.ok_or(RequestError::Unauthenticated)?;
        context.authorize()?;
        Ok(context)
    }

    fn status(&self, error: RequestError) -> Status {
        self.0.metrics.rejected(error.code());
        error.into()
    }

    async fn start(&self, mut request: Request<GenerateRequest>) -> Result<Answer, RequestError> {
        let mut context = self.context(&mut request)?;
        let timeout = timeout(request.metadata().as_ref());
        let request = request.into_inner();
        if !request.request_id.is_empty() {
            context.rename(&request.request_id)?;
        }
        let arrival = context.arrival(timeout, &self.0)?;
        self.0.generate(request, arrival).await
    }

    async fn whole(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<GenerateResponse, RequestError> {
        let mut answer = self.start(request).await?;
        let job = answer.job.clone();
        let mut response = GenerateResponse {
            request_id: job.arrival.request_id.to_string(),
            model: job.model.name.to_string(),
            seed: job.seed,
            usage: None,
            choices: (0..job.choices)
                .map(|index| Choice {
                    index,
                    ..Choice::default()
                })
                .collect(),
        };
        while let Some(growth) = answer.next().await {
            let growth = growth?;
            if growth.usage.is_some() {
                response.usage = growth.usage;
            }
            let Some(choice) = response.choices.get_mut(growth.index as usize) else {
                continue;
            };
            choice.text.push_str(&growth.text);
            choice.token_ids.extend(growth.token_ids);
            choice.logprobs.extend(growth.logprobs);
            if let Some(finish) = growth.finish {
                choice.set_finish_reason(finish);
                choice.stop = growth.stop.unwrap_or_default();
            }
        }
        Ok(response)
    }

    fn chunks(&self, answer: Answer) -> impl Stream<Item = Result<GenerateChunk, Status>> + use<> {
        let job = answer.job.clone();
        let service = self.0.clone();
        answer.into_stream().map(move |growth| {
            let growth = growth.map_err(|error| {
                service.metrics.rejected(error.code());
                Status::from(error)
            })?;
            let mut chunk = GenerateChunk {
                request_id: job.arrival.request_id.to_string(),
                model: job.model.name.to_string(),
                index: growth.index,
                text: growth.text,
                token_ids: growth.token_ids,
                logprobs: growth.logprobs,
                stop: growth.stop.unwrap_or_default(),
                usage: growth.usage,
                seed: job.seed,
                ..GenerateChunk::default()
            };
            chunk.set_finish_reason(growth.finish.unwrap_or_default());
            Ok(chunk)
        })
    }

    async fn encode(
        &self,
        mut request: Request<TokenizeRequest>,
    ) -> Result<TokenizeResponse, RequestError> {
        self.context(&mut request)?;
        let request = request.into_inner();
        let options = EncodeOptions {
            add_special: request.add_special,
            parse_special: request.parse_special,
        };
        let ids = admin::encode(&self.0, &request.model, request.text, options).await?;
        Ok(TokenizeResponse { ids })
    }

    fn decode(
        &self,
        mut request: Request<DetokenizeRequest>,
    ) -> Result<DetokenizeResponse, RequestError> {
        self.context(&mut request)?;
        let request = request.into_inner();
        let text = admin::decode(&self.0, &request.model, &request.ids)?;
        Ok(DetokenizeResponse { text })
    }
}

#[tonic::async_trait]
impl Inference for Grpc {
    type GenerateStreamStream = BoxStream<'static, Result<GenerateChunk, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let response = self.whole(request).await;
        Ok(Response::new(response.map_err(|error| self.status(error))?))
    }

    async fn generate_stream(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let answer = self.start(request).await;
        let answer = answer.map_err(|error| self.status(error))?;
        Ok(Response::new(self.chunks(answer).boxed()))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let response = self.encode(request).await;
        Ok(Response::new(response.map_err(|error| self.status(error))?))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let response = self.decode(request);
        Ok(Response::new(response.map_err(|error| self.status(error))?))
    }

    async fn list_models(
        &self,
        mut request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        self.context(&mut request)
            .map_err(|error| self.status(error))?;
        let models = self.0.cluster.models();
        let models = models.iter().map(|model| Model {
            id: model.name.to_string(),
            context_length: model.context(),
            vocab_size: model.description.vocab_size,
            quantization: model.description.quantization.clone(),
            architecture: model.description.architecture.clone(),
            created: model.created,
        });
        Ok(Response::new(ListModelsResponse {
            models: models.collect(),
        }))
    }
}

/// The `grpc-timeout` of a call: at most eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_parse() {
        let parse = |value: &str| {
            let value = value.parse().unwrap();
            timeout(&HeaderMap::from_iter([(
                "grpc-timeout".parse().unwrap(),
                value,
            )]))
        };
        assert_eq!(parse("5S"), Some(Duration::from_secs(5)));
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(
            parse("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for broken in ["", "S", "5", "5s", "-1S", "123456789S"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }
}
