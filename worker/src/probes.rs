//! HTTP probes and grpc.health.v1, both from the worker's state.

use std::sync::Arc;

use axum::{
    Router,
    http::StatusCode,
    response::IntoResponse,
    routing::{MethodRouter, get},
};
use shoal_proto::worker::{WorkerState, worker_server::SERVICE_NAME};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::worker::Worker;

/// `/live` is 200 as long as the process answers; `/ready` and `/health` are 200 while it is
/// READY, and 503 otherwise.
pub(crate) fn routes(worker: &Arc<Worker>) -> Router {
    let ready = |worker: &Arc<Worker>| -> MethodRouter {
        let worker = worker.clone();
        get(async move || readiness(worker.state()))
    };
    Router::new()
        .route("/live", get(async || "live\n"))
        .route("/ready", ready(worker))
        .route("/health", ready(worker))
}

fn readiness(state: WorkerState) -> impl IntoResponse {
    match state {
        WorkerState::Ready => (StatusCode::OK, "ready\n"),
        WorkerState::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        WorkerState::Starting | WorkerState::Unspecified => {
            (StatusCode::SERVICE_UNAVAILABLE, "starting\n")
        }
    }
}

/// Sets the health of the process and of its service.
pub(crate) async fn set_health(reporter: &HealthReporter, state: WorkerState) {
    let status = match state {
        WorkerState::Ready => ServingStatus::Serving,
        _ => ServingStatus::NotServing,
    };
    for service in ["", SERVICE_NAME] {
        reporter.set_service_status(service, status).await;
    }
}

/// Keeps the health at the worker's state, until it closes.
pub(crate) async fn follow_state(worker: Arc<Worker>, reporter: HealthReporter) {
    let mut state = worker.watch();
    let follow = async {
        while state.changed().await.is_ok() {
            let state = *state.borrow_and_update();
            set_health(&reporter, state).await;
        }
    };
    worker.closing.run_until_cancelled(follow).await;
}
