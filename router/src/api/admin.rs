//! Models, tokens and health over HTTP.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shoal_text::EncodeOptions;

use super::{body::JsonBody, context::Authorized};
use crate::{error::RequestError, model::Model, request::off_thread, service::Service};

/// `GET /v1/models`
pub(super) async fn models(State(service): State<Arc<Service>>, _: Authorized) -> Json<Value> {
    let models = service.cluster.models();
    let data: Vec<Value> = models.iter().map(|model| describe(model)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`; ids may contain slashes.
pub(super) async fn model(
    State(service): State<Arc<Service>>,
    _: Authorized,
    Path(id): Path<String>,
) -> Result<Json<Value>, RequestError> {
    let models = service.cluster.models();
    let found = models.iter().find(|model| *model.name == *id);
    let model = found.ok_or(RequestError::ModelNotFound { model: id })?;
    Ok(Json(describe(model)))
}

fn describe(model: &Model) -> Value {
    let d = &model.description;
    json!({
        "id": &*model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "shoal",
        "context_length": model.context(),
        "vocab_size": d.vocab_size,
        "architecture": d.architecture,
        "quantization": d.quantization,
    })
}

#[derive(Debug, Deserialize)]
pub(super) struct Tokenize {
    content: String,
    #[serde(default)]
    add_special: bool,
    #[serde(default = "yes")]
    parse_special: bool,
    #[serde(default)]
    model: String,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize)]
pub(super) struct Tokens {
    tokens: Vec<u32>,
}

/// `POST /tokenize`
pub(super) async fn tokenize(
    State(service): State<Arc<Service>>,
    _: Authorized,
    JsonBody(body): JsonBody<Tokenize>,
) -> Result<Json<Tokens>, RequestError> {
    let options = EncodeOptions {
        add_special: body.add_special,
        parse_special: body.parse_special,
    };
    let tokens = encode(&service, &body.model, body.content, options).await?;
    Ok(Json(Tokens { tokens }))
}

/// The tokens of a text.
pub(super) async fn encode(
    service: &Service,
    model: &str,
    content: String,
    options: EncodeOptions,
) -> Result<Vec<u32>, RequestError> {
    let text = service.cluster.model(model)?.text.clone();
    off_thread(content.len(), move || {
        Ok(text.tokenizer.encode(&content, options)?)
    })
    .await
}

#[derive(Debug, Deserialize)]
pub(super) struct Detokenize {
    tokens: Vec<u32>,
    #[serde(default)]
    model: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Content {
    content: String,
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    State(service): State<Arc<Service>>,
    _: Authorized,
    JsonBody(body): JsonBody<Detokenize>,
) -> Result<Json<Content>, RequestError> {
    let content = decode(&service, &body.model, &body.tokens)?;
    Ok(Json(Content { content }))
}

/// The text of known tokens.
pub(super) fn decode(
    service: &Service,
    model: &str,
    tokens: &[u32],
) -> Result<String, RequestError> {
    let model = service.cluster.model(model)?;
    let vocab = model.description.vocab_size;
    if let Some(unknown) = tokens.iter().find(|&&token| token >= vocab) {
        let message = format!("token {unknown} is not in the vocabulary of {vocab}");
        return Err(RequestError::invalid("tokens", message));
    }
    Ok(model.text.tokenizer.decode(tokens))
}

/// `GET /health` and `GET /ready`: whether requests should come here.
pub(super) async fn ready(State(service): State<Arc<Service>>) -> (StatusCode, Json<Value>) {
    if service.is_ready() {
        return (StatusCode::OK, Json(json!({"status": "ok"})));
    }
    let status = if service.shutdown.is_started() {
        "draining"
    } else {
        "no worker is ready"
    };
    (
        StatusCode::SERVICE_UNAVAILABLE,
        Json(json!({"status": status})),
    )
}

/// `GET /live`: the process answers.
pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "ok"}))
}
