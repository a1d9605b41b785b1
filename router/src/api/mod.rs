//! The doors of a router: OpenAI's HTTP API, gRPC, and what operators look at. All on one
//! port, all onto one request path.

mod account;
mod admin;
mod body;
mod context;
mod corpus;
mod error;
mod grpc;
mod openai;
mod operate;
mod peers;

pub(crate) use grpc::Grpc;

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware::from_fn_with_state,
    routing::{get, post},
};
use http::{Method, Uri};
use shoal_fabric::{metrics::Registry, net::one_port};
use shoal_proto::{
    DESCRIPTORS,
    admin::admin_server::AdminServer,
    inference::{corpus_server::CorpusServer, inference_server::InferenceServer},
    router::router_server::RouterServer,
};
use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::{
    error::{RequestError, RouterError},
    service::Service,
};

/// Everything that the router's port serves.
pub(crate) fn app(
    service: Arc<Service>,
    registry: &Registry,
    health: HealthServer<impl Health>,
) -> Result<Router, RouterError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let inference = InferenceServer::new(Grpc(service.clone()))
        .max_decoding_message_size(service.max_body_bytes);
    let corpora = CorpusServer::new(corpus::Corpus(service.clone()))
        .max_decoding_message_size(service.max_body_bytes);
    let grpc = Routes::new(inference)
        .add_service(AdminServer::new(operate::Admin(service.clone())))
        .add_service(corpora)
        .add_service(RouterServer::new(peers::Peers(service.clone())))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);

    let http = Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(admin::models))
        .route("/v1/models/{*id}", get(admin::model))
        .route("/tokenize", post(admin::tokenize))
        .route("/detokenize", post(admin::detokenize))
        .route("/health", get(admin::ready))
        .route("/ready", get(admin::ready))
        .route("/live", get(admin::live))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        // Bodies are limited where they are read, with an error of OpenAI's shape.
        .layer(DefaultBodyLimit::disable())
        .with_state(service.clone())
        .merge(registry.routes());
    Ok(one_port(http, grpc).layer(from_fn_with_state(service, context::surround)))
}

async fn not_found(method: Method, uri: Uri) -> RequestError {
    RequestError::RouteNotFound {
        method: method.to_string(),
        path: uri.path().to_owned(),
    }
}

async fn not_allowed(method: Method, uri: Uri) -> RequestError {
    RequestError::MethodNotAllowed {
        method: method.to_string(),
        path: uri.path().to_owned(),
    }
}
