//! What a rank elsewhere tells of itself.

use prometheus_client::{metrics::counter::Counter, registry};
use shoal_fabric::{
    metrics::Registry,
    net::{self, ListenConfig},
    shutdown::Shutdown,
};
use shoal_proto::worker::WorkerState;
use tokio::sync::watch;
use tonic::service::Routes;

use crate::{compute::ComputeCollector, error::WorkerError, probes::Port};

/// Clones share their values.
#[derive(Clone, Debug)]
pub(super) struct Status {
    /// READY while the group is whole.
    state: watch::Sender<WorkerState>,
    formations: Counter,
    pub(super) steps: Counter,
}

impl Status {
    pub(super) fn new() -> Self {
        Self {
            state: watch::Sender::new(WorkerState::Starting),
            formations: Counter::default(),
            steps: Counter::default(),
        }
    }

    /// Tells whoever asks at `listen`.
    ///
    /// # Errors
    /// When it cannot listen.
    pub(super) async fn serve(
        &self,
        listen: &ListenConfig,
        shutdown: &Shutdown,
    ) -> Result<Port, WorkerError> {
        let listener = net::bind(listen).await?;
        let address = listener.local_addr().map_err(WorkerError::Address)?;
        shutdown.listening(address);
        tracing::info!(%address, "probes and metrics");
        let registry = Registry::default();
        registry.register(|r| self.register(r));
        let state = self.state.subscribe();
        Ok(Port::open(listener, shutdown, state, &registry, Routes::default()).await)
    }

    fn register(&self, registry: &mut registry::Registry) {
        registry.register_collector(Box::new(ComputeCollector));
        let r = registry.sub_registry_with_prefix("rank");
        r.register(
            "formations",
            "Times that the group became whole",
            self.formations.clone(),
        );
        r.register(
            "steps",
            "Steps that this rank has done its share of",
            self.steps.clone(),
        );
    }

    /// The group is whole, until what this returns is dropped.
    pub(super) fn whole(&self) -> Whole<'_> {
        self.formations.inc();
        self.state.send_replace(WorkerState::Ready);
        Whole(&self.state)
    }
}

/// See [`Status::whole`].
pub(super) struct Whole<'a>(&'a watch::Sender<WorkerState>);

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        self.0.send_replace(WorkerState::Starting);
    }
}
