//! What tells the state of a worker, or of a rank elsewhere: HTTP probes, grpc.health.v1 and metrics.

use axum::{
    Router,
    http::StatusCode,
    response::IntoResponse,
    routing::{MethodRouter, get},
};
use shoal_fabric::{
    metrics::Registry,
    net::{self, Listener},
    shutdown::Shutdown,
};
use shoal_proto::worker::{WorkerState, worker_server::SERVICE_NAME};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

/// A port that is served.
pub(crate) struct Port {
    stop: CancellationToken,
    tasks: [JoinHandle<()>; 2],
}

impl Port {
    /// Serves the probes of `state`, the metrics and `grpc` on a bound listener.
    pub(crate) async fn open(
        listener: Listener,
        shutdown: &Shutdown,
        state: watch::Receiver<WorkerState>,
        registry: &Registry,
        grpc: Routes,
    ) -> Self {
        let (reporter, health) = tonic_health::server::health_reporter();
        let now = *state.borrow();
        set_health(&reporter, now).await;
        let http = routes(&state).merge(registry.routes());
        let app = net::one_port(http, grpc.add_service(health));
        let stop = CancellationToken::new();
        let follow = follow_state(state, reporter, stop.clone());
        Self {
            tasks: [
                shutdown.spawn(follow),
                shutdown.spawn(net::serve(listener, app, stop.clone())),
            ],
            stop,
        }
    }

    /// Takes no more requests; the future ends with the last connection.
    pub(crate) fn close(self) -> impl Future<Output = ()> {
        self.stop.cancel();
        async move {
            for task in self.tasks {
                if let Err(error) = task.await {
                    tracing::error!(%error, "a part of the service broke off");
                }
            }
        }
    }
}

/// `/live` is 200 as long as the process answers; `/ready` and `/health` are 200 while it is
/// READY, and 503 otherwise.
fn routes(state: &watch::Receiver<WorkerState>) -> Router {
    let ready = || -> MethodRouter {
        let state = state.clone();
        get(async move || readiness(*state.borrow()))
    };
    Router::new()
        .route("/live", get(async || "live\n"))
        .route("/ready", ready())
        .route("/health", ready())
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
async fn set_health(reporter: &HealthReporter, state: WorkerState) {
    let status = match state {
        WorkerState::Ready => ServingStatus::Serving,
        _ => ServingStatus::NotServing,
    };
    for service in ["", SERVICE_NAME] {
        reporter.set_service_status(service, status).await;
    }
}

/// Keeps the health at the state, until the port closes.
async fn follow_state(
    mut state: watch::Receiver<WorkerState>,
    reporter: HealthReporter,
    stop: CancellationToken,
) {
    let follow = async {
        while state.changed().await.is_ok() {
            let state = *state.borrow_and_update();
            set_health(&reporter, state).await;
        }
    };
    stop.run_until_cancelled(follow).await;
}
