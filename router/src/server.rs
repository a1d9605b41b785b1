//! A router as a process runs it.

use std::{net::SocketAddr, sync::Arc};

use shoal_fabric::{
    membership::{Member, Role, State},
    metrics::Registry,
    net::{self, Listener},
    shutdown::Shutdown,
};
use shoal_proto::inference::inference_server::InferenceServer;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    admission::Admission,
    api::{self, Grpc},
    cluster::Cluster,
    config::RouterConfig,
    corpus::Corpora,
    error::RouterError,
    metrics::{Metrics, StateCollector},
    peers,
    service::{Parts, Service},
};

/// A router whose port is bound.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    config: RouterConfig,
}

impl Server {
    /// Binds the port.
    ///
    /// # Errors
    /// When it is taken, or a TLS file is wrong.
    pub async fn bind(config: RouterConfig) -> Result<Self, RouterError> {
        let listener = net::bind(&config.listen).await?;
        Ok(Self { listener, config })
    }

    /// The address, with the port that was taken for port 0.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn local_addr(&self) -> Result<SocketAddr, RouterError> {
        self.listener.local_addr().map_err(RouterError::Address)
    }

    /// Serves until the shutdown, and on until the open answers have ended: new requests are
    /// refused then, and probes see it.
    ///
    /// # Errors
    /// When a service cannot be set up.
    pub async fn serve(self, shutdown: Shutdown) -> Result<(), RouterError> {
        let Self { listener, config } = self;
        let address = listener.local_addr().map_err(RouterError::Address)?;
        let (name, advertise) = (config.name.as_deref(), config.advertise.as_ref());
        let own = Member::own(Role::Router, name, advertise, address)?;
        let (own, record) = watch::channel(own);
        let registry = Registry::default();
        let metrics = Metrics::new(&registry);
        let corpora = Arc::new(Corpora::new(config.corpus, metrics.clone()));
        let reached = own.borrow().address.clone();
        peers::start(
            config.membership.as_ref(),
            reached,
            config.peers,
            corpora.clone(),
            metrics.clone(),
            &shutdown,
        );
        // Links outlive the shutdown's start: open answers still need them.
        let cluster = Cluster::start(
            config.membership.as_ref(),
            config.link,
            config.routing,
            metrics.clone(),
            corpora.clone(),
            &shutdown,
        );
        let admission = Admission::new(config.admission);
        let state = StateCollector {
            admission: Arc::downgrade(&admission),
            cluster: Arc::downgrade(&cluster),
        };
        registry.register(|registry| registry.register_collector(Box::new(state)));
        let service = Arc::new(Service::new(Parts {
            cluster: cluster.clone(),
            admission,
            metrics,
            shutdown: shutdown.clone(),
            own,
            keys: config.keys,
            max_body_bytes: config.max_body_bytes,
            request_timeout: config.request_timeout,
            resume_window: config.resume_window,
            default_max_tokens: config.default_max_tokens,
        }));
        let (reporter, health) = tonic_health::server::health_reporter();
        // It starts out as serving, and no worker is connected yet.
        reporter
            .set_service_status("", ServingStatus::NotServing)
            .await;
        let app = api::app(service.clone(), &registry, health)?;
        let registration = config.membership.register(record);
        let reporting = shutdown.spawn(report(service.clone(), reporter));
        tracing::info!(%address, "router listens");
        shutdown.listening(address);
        let stop = CancellationToken::new();
        let ending = async {
            shutdown.started().await;
            service.end(config.drain).await;
            corpora.closing.cancel();
            stop.cancel();
        };
        tokio::join!(net::serve(listener, app, stop.clone()), ending);
        cluster.stop();
        reporting.abort();
        registration.end().await;
        Ok(())
    }
}

/// Runs a router until the shutdown.
///
/// # Errors
/// When its port cannot be bound or a service cannot be set up.
pub async fn run(config: RouterConfig, shutdown: Shutdown) -> Result<(), RouterError> {
    Server::bind(config).await?.serve(shutdown).await
}

/// Keeps `grpc.health.v1` and the membership record at the state of `/ready`.
async fn report(service: Arc<Service>, reporter: HealthReporter) {
    let mut changes = service.cluster.watch();
    loop {
        let (status, state) = if service.is_ready() {
            service.shutdown.ready();
            (ServingStatus::Serving, State::Ready)
        } else if service.shutdown.is_started() {
            (ServingStatus::NotServing, State::Draining)
        } else {
            (ServingStatus::NotServing, State::Starting)
        };
        let changed = |own: &mut Member| std::mem::replace(&mut own.state, state) != state;
        service.own.send_if_modified(changed);
        reporter.set_service_status("", status).await;
        reporter
            .set_service_status(
                <InferenceServer<Grpc> as tonic::server::NamedService>::NAME,
                status,
            )
            .await;
        if service.shutdown.is_started() {
            return;
        }
        tokio::select! {
            _ = changes.changed() => {}
            () = service.shutdown.started() => {}
        }
    }
}
