//! The life of a worker: listen, load, run once, serve, drain.

use std::{
    future::ready,
    sync::{Arc, atomic::Ordering},
};

use futures::future::{BoxFuture, FutureExt};
use prost::Message;
use sha2::{Digest, Sha256};
use shoal_core::{Namespace, PAGE_TOKENS, Sampling, Scoring, Speculation, Stopping};
use shoal_engine::{
    backend::Backend,
    config::EngineConfig,
    engine::{Engine, EngineError, EngineHandle},
    request::{Request, SequenceKey, StepSink},
};
use shoal_fabric::{
    metrics::Registry,
    net::{self, Listener},
    shutdown::Shutdown,
};
use shoal_proto::{
    MAX_ROUTER_FRAME, PROTOCOL_VERSION,
    worker::{Finish, ModelDescription, worker_server::WorkerServer},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    compute::ComputeCollector,
    config::{WorkerConfig, WorkerRole},
    corpus::ERASURES,
    epoch,
    error::WorkerError,
    group::Watch,
    load::{self, LoadError, Loaded},
    member,
    probes::Port,
    service::Service,
    sessions::{Seat, Sink},
    wire::Identity,
    worker::{Serving, Worker},
};

/// Makes what a worker serves, from its settings and where the engine's outputs go.
type Assembly = BoxFuture<'static, Result<Serving, WorkerError>>;

/// Runs a worker until the shutdown starts and its sequences have ended, or until it fails.
/// It listens before it loads, so that probes see it STARTING.
///
/// # Errors
/// When it cannot listen, the model cannot be loaded or run, or the engine stops.
pub async fn run(config: WorkerConfig, shutdown: Shutdown) -> Result<(), WorkerError> {
    run_with(config, shutdown, load::model).await
}

/// [`run`] with any way to load a model.
///
/// # Errors
/// As those of [`run`].
pub async fn run_with(
    config: WorkerConfig,
    shutdown: Shutdown,
    load: impl FnOnce(&WorkerConfig) -> Result<Loaded, LoadError> + Send + 'static,
) -> Result<(), WorkerError> {
    listen(config, shutdown, on_own_threads(load)).await
}

/// [`run_with`] without threads of its own: the model is loaded on the caller's, and the
/// engine is what `start` makes of it.
///
/// # Errors
/// As those of [`run`].
pub async fn run_driven(
    config: WorkerConfig,
    shutdown: Shutdown,
    load: impl FnOnce(&WorkerConfig) -> Result<Loaded, LoadError>,
    start: impl FnOnce(
        Box<dyn Backend>,
        EngineConfig,
        Box<dyn StepSink>,
    ) -> Result<EngineHandle, EngineError>,
) -> Result<(), WorkerError> {
    let assemble = |config, sink| ready(assemble(&config, load, start, sink)).boxed();
    listen(config, shutdown, assemble).await
}

async fn listen(
    config: WorkerConfig,
    shutdown: Shutdown,
    assemble: impl FnOnce(WorkerConfig, Sink) -> Assembly,
) -> Result<(), WorkerError> {
    config.validate()?;
    let listener = net::bind(&config.listen).await?;
    let address = listener.local_addr().map_err(WorkerError::Address)?;
    shutdown.listening(address);
    serve(config, listener, shutdown, assemble).await
}

/// Serves on a bound listener what `assemble` makes.
pub(crate) async fn serve(
    config: WorkerConfig,
    listener: Listener,
    shutdown: Shutdown,
    assemble: impl FnOnce(WorkerConfig, Sink) -> Assembly,
) -> Result<(), WorkerError> {
    let address = listener.local_addr().map_err(WorkerError::Address)?;
    let member = config.member(address)?;
    let worker = Arc::new(Worker::new(&config, shutdown));
    let registry = Registry::default();
    registry.register(|r| {
        worker.metrics.register(r);
        r.register_collector(Box::new(ComputeCollector));
    });
    let service =
        WorkerServer::new(Service(worker.clone())).max_decoding_message_size(MAX_ROUTER_FRAME);
    let grpc = Routes::new(service).add_service(reflection()?);
    let state = worker.watch();
    let port = Port::open(listener, &worker.shutdown, state, &registry, grpc).await;

    let group = member.name.clone();
    let registration = member::join(&worker, config.membership.as_ref(), member);
    let result = live(&worker, config, &group, &registry, assemble).await;
    // Sessions send what they have and end; then connections have nothing to wait for.
    worker.closing.cancel();
    let closed = port.close();
    registration.end().await;
    closed.await;
    result
}

fn reflection() -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<
        impl tonic_reflection::server::v1::ServerReflection,
    >,
    tonic_reflection::server::Error,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(shoal_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}

/// From loading to the last sequence.
async fn live(
    worker: &Worker,
    config: WorkerConfig,
    group: &str,
    registry: &Registry,
    assemble: impl FnOnce(WorkerConfig, Sink) -> Assembly,
) -> Result<(), WorkerError> {
    let shutdown = worker.shutdown.token();
    let drain = config.drain;
    let engine_ended = CancellationToken::new();
    let sink = Sink::new(
        worker.sessions.clone(),
        worker.pages.clone(),
        engine_ended.clone().drop_guard(),
    );
    let membership = config.membership.clone();
    let start = async {
        let epoch = membership.next_epoch(group, epoch::now());
        let (loaded, epoch) = tokio::join!(assemble(config, sink), epoch);
        let mut loaded = loaded?;
        loaded.set_epoch(epoch);
        registry.register(|r| loaded.engine.metrics().register(r));
        warm_up(&loaded.engine, worker.sessions.open_own()).await?;
        Ok::<_, WorkerError>(loaded)
    };
    let Some(serving) = shutdown.run_until_cancelled(start).await.transpose()? else {
        return Ok(());
    };
    let (engine, group) = (serving.engine.clone(), serving.group.clone());
    tracing::info!(
        model = serving.description.model,
        backend = serving.description.backend,
        pages = serving.description.pages,
        context = serving.description.context_length,
        epoch = serving.identity.epoch,
        "ready"
    );
    worker.ready(serving);
    worker.shutdown.ready();
    let follow = async {
        match &group {
            Some(group) => follow_group(worker, &engine, group).await,
            None => std::future::pending().await,
        }
    };
    let serve = async {
        shutdown.run_until_cancelled(follow).await;
        if let Some(group) = &group {
            group.closing.store(true, Ordering::Release);
        }
        tracing::info!("draining");
        worker.finish(&engine, drain).await;
    };
    tokio::select! {
        biased;
        () = serve => Ok(()),
        () = engine_ended.cancelled() => {
            Err(WorkerError::EngineStopped(engine.stopped().unwrap_or_default()))
        }
    }
}

/// Lets the engine look after a rank has ended, and the routers know while the group is broken.
async fn follow_group(worker: &Worker, engine: &EngineHandle, group: &Watch) {
    let (mut whole, mut deaths) = (group.whole.subscribe(), group.deaths.subscribe());
    loop {
        worker.set_broken(!*whole.borrow_and_update());
        // The senders are in `group`.
        tokio::select! {
            _ = whole.changed() => {}
            _ = deaths.changed() => engine.check(),
        }
    }
}

/// Loads on a thread, and lets the engine have another. Loading reads and packs gigabytes: it
/// must not hold up the listener, nor the end of the process.
pub(crate) fn on_own_threads(
    load: impl FnOnce(&WorkerConfig) -> Result<Loaded, LoadError> + Send + 'static,
) -> impl FnOnce(WorkerConfig, Sink) -> Assembly {
    |config, sink| {
        let load = async move {
            let (done, result) = oneshot::channel();
            let work = move || assemble(&config, load, Engine::start, sink);
            std::thread::Builder::new()
                .name("load".into())
                // Nobody listens any more where the shutdown came first.
                .spawn(move || drop(done.send(work())))
                .map_err(WorkerError::LoadThread)?;
            result.await.map_err(|_| WorkerError::LoadBroken)?
        };
        load.boxed()
    }
}

/// Loads the model and starts its engine.
fn assemble(
    config: &WorkerConfig,
    load: impl FnOnce(&WorkerConfig) -> Result<Loaded, LoadError>,
    start: impl FnOnce(
        Box<dyn Backend>,
        EngineConfig,
        Box<dyn StepSink>,
    ) -> Result<EngineHandle, EngineError>,
    sink: Sink,
) -> Result<Serving, WorkerError> {
    let model = config.served_name()?;
    let Loaded {
        backend,
        tokenizer,
        group,
    } = load(config).map_err(|source| WorkerError::Load {
        path: config.model.clone(),
        source,
    })?;
    let identity = Identity {
        epoch: 0,
        numerics_id: backend.numerics_id().0,
        drafts: config.role == WorkerRole::Draft,
    };
    let bundle = tokenizer.encode_to_vec();
    let mut description = describe(backend.as_ref(), model, &identity);
    description.tokenizer_sha256 = Sha256::digest(&bundle).to_vec();
    Ok(Serving {
        engine: start(backend, config.engine.clone(), Box::new(sink))?,
        identity,
        description,
        bundle: bundle.into(),
        group,
    })
}

fn describe(backend: &dyn Backend, model: String, identity: &Identity) -> ModelDescription {
    let spec = backend.spec();
    let pool = backend.pages() as usize * PAGE_TOKENS;
    ModelDescription {
        protocol_version: PROTOCOL_VERSION,
        features: vec![ERASURES.into()],
        model,
        architecture: spec.architecture.name().into(),
        quantization: spec.quantization.clone(),
        context_length: spec.context.min(pool) as u32,
        vocab_size: spec.vocab as u32,
        page_size: PAGE_TOKENS as u32,
        pages: backend.pages(),
        tensor_parallel: backend.ranks() as u32,
        backend: backend.name().into(),
        numerics_id: identity.numerics_id.into(),
        epoch: identity.epoch,
        drafts: identity.drafts,
        ..ModelDescription::default()
    }
}

/// Runs one token through the model, and waits for the end of it.
async fn warm_up(engine: &EngineHandle, seat: Seat) -> Result<(), WorkerError> {
    engine.submit(Request {
        key: SequenceKey {
            session: seat.id,
            sequence: 0,
            attempt: 0,
        },
        prompt: vec![0],
        resume: Vec::new(),
        sampling: Sampling::default(),
        stopping: Stopping {
            max_tokens: 1,
            ..Stopping::default()
        },
        scoring: Scoring::default(),
        namespace: Namespace::new("", "warm-up"),
        priority: 0,
        deadline: None,
        speculation: Speculation::Off,
        corpora: Vec::new(),
        lead: None,
    })?;
    while let Ok(pending) = seat.outbox.take().await {
        match pending.ended().next().map(|last| last.finish()) {
            None => {}
            Some(Finish::Length) => return Ok(()),
            Some(_) => break,
        }
    }
    Err(WorkerError::FirstRun {
        reason: engine.stopped(),
    })
}
