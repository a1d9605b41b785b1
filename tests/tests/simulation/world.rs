//! One simulation: the cluster, its load and its faults, and the laws that it must keep.

use std::{cell::RefCell, future::pending, rc::Rc, sync::Arc, time::Duration};

use futures::future::join_all;
use mad_turmoil::time::SimClocksGuard;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use shoal_core::Speculation;
use shoal_engine::config::EngineConfig;
use shoal_fabric::{
    membership::Etcd as EtcdMembership,
    net::{self, ClientConfig, Network},
    shutdown::Shutdown,
};
use shoal_proto::inference::{ListModelsRequest, inference_client::InferenceClient};
use shoal_router::{RouterArgs, Server};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep, sleep_until},
};
use tonic::transport::Channel;

use crate::{
    client::{Outcome, Plan, ask},
    etcd::{self, Etcd},
    faults::{self, ETCD, LEAST_DELAY, MOST_DELAY, ROUTER, Stage, host},
    laws,
    look::{Look, look},
    network::Turmoil,
    trace::Trace,
    worker::{self, Held},
};

/// Time between deliveries of the network.
pub(crate) const TICK: Duration = Duration::from_millis(5);
/// Until all workers are known.
const START: Duration = Duration::from_secs(2);
/// Faults end here.
const CALM: Duration = Duration::from_secs(25);
/// Longer than any patience of the router after that: a breaker is open for 30 s at most.
const QUIET: Duration = Duration::from_secs(60);
/// Longer than anything here takes.
const LONGEST: Duration = Duration::from_secs(180);
pub(crate) const ROUTER_PORT: u16 = 8080;
/// Sequences that the queue of some workers holds.
pub(crate) const FEW_WAITING: usize = 3;
/// Of the requests that the router is asked just before its end.
const LAST_IDS: u64 = 2000;
/// Requests after all is quiet again, for each worker.
const LAST: usize = 6;

/// What is random from now on is so by the seed.
pub(crate) fn prepare(seed: u64) -> Trace {
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(seed));
    Trace::start()
}

/// What a seed draws.
pub(crate) struct Draws {
    pub(crate) workers: usize,
    /// The first worker is spared.
    pub(crate) rock: bool,
    max_running: u32,
    pub(crate) engine: EngineConfig,
    plans: Vec<Plan>,
}

fn draw(rng: &mut StdRng) -> Draws {
    let workers = rng.random_range(2..=4);
    let count = rng.random_range(20..80);
    let plans = (0..count).map(|id| {
        let at = rng.random_range(START.as_millis() as u64..CALM.as_millis() as u64);
        Plan::draw(id, Duration::from_millis(at), rng)
    });
    let mut plans: Vec<Plan> = plans.collect();
    for i in 0..LAST * workers {
        plans.push(Plan::whole(1000 + i as u64, CALM + QUIET, rng));
    }
    Draws {
        workers,
        rock: rng.random_bool(0.6),
        max_running: if rng.random_bool(0.8) { 256 } else { 5 },
        engine: EngineConfig {
            max_waiting: if rng.random_bool(0.8) {
                1024
            } else {
                FEW_WAITING
            },
            max_running: 8,
            step_rows: 64,
            prefill_chunk: 32,
            speculation: match rng.random_bool(0.5) {
                true => Speculation::Auto,
                false => Speculation::Off,
            },
            ..EngineConfig::default()
        },
        plans,
    }
}

/// What clients and the router's host tell the checks.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) outcomes: Vec<Outcome>,
    /// Before the load, when all is quiet, and at the end.
    pub(crate) looks: Vec<Look>,
    router: Option<(Shutdown, Handle)>,
    /// The orderly end left nothing behind.
    pub(crate) finished: Vec<String>,
}

type Shared = Rc<RefCell<Report>>;

/// Runs the seed; the laws that it breaks.
pub(crate) fn run(seed: u64) -> Vec<String> {
    let _clocks = SimClocksGuard::init();
    let mut rng = StdRng::seed_from_u64(seed);
    let draws = draw(&mut rng);
    let schedule = faults::draw(draws.workers, draws.rock, CALM, &mut rng);
    let sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(LONGEST)
        .min_message_latency(LEAST_DELAY)
        .max_message_latency(MOST_DELAY)
        .tcp_capacity(4096)
        .build();
    let mut stage = Stage {
        sim,
        network: Turmoil::default(),
        etcd: Etcd::default(),
        workers: Vec::new(),
    };
    tracing::info!(draws.workers, draws.rock, draws.max_running, ?draws.engine, "begins");
    let report = Shared::default();
    let network = stage.network.network();
    {
        let (etcd, network) = (stage.etcd.clone(), network.clone());
        stage
            .sim
            .host(ETCD, move || etcd.clone().serve(network.clone()));
    }
    {
        let (report, network, max_running) = (report.clone(), network.clone(), draws.max_running);
        stage.sim.host(ROUTER, move || {
            router(report.clone(), network.clone(), max_running)
        });
    }
    for w in 0..draws.workers {
        let held = Held::default();
        stage.workers.push(held.clone());
        let (engine, network) = (draws.engine.clone(), network.clone());
        stage.sim.host(host(w), move || {
            let (engine, network, held) = (engine.clone(), network.clone(), held.clone());
            async move {
                // One after the other, and not at the beginning of time.
                sleep(Duration::from_millis(100 + 50 * w as u64)).await;
                let run = worker::run(host(w), engine, network, held.clone());
                if let Err(error) = run.await {
                    tracing::warn!(error, "the worker's process has ended");
                    held.lock().unwrap().failed = true;
                }
                pending().await
            }
        });
    }
    let load = load(
        report.clone(),
        network,
        draws.plans.clone(),
        stage.workers.clone(),
    );
    stage.sim.client("client", load);
    let mut changes = schedule.iter().peekable();
    loop {
        while let Some((_, now)) = changes.next_if(|(at, _)| **at <= stage.sim.elapsed()) {
            now.iter().for_each(|change| stage.change(change));
        }
        stage.supervise();
        match stage.sim.step() {
            Ok(false) => {}
            Ok(true) => break,
            Err(error) => return vec![format!("the simulation broke off: {error}")],
        }
    }
    let report = report.take();
    laws::check(&draws, &schedule, &report)
}

/// The router's process.
async fn router(report: Shared, network: Network, max_running: u32) -> turmoil::Result {
    let membership = EtcdMembership::on(Handle::current(), etcd::config(network.clone()))?;
    let args = RouterArgs {
        network,
        listen: ([0, 0, 0, 0], ROUTER_PORT).into(),
        membership: Some(Arc::new(membership)),
        advertise: Some(format!("{ROUTER}:{ROUTER_PORT}").parse()?),
        name: Some(ROUTER.into()),
        max_running,
        ..RouterArgs::default()
    };
    let shutdown = Shutdown::new();
    report.borrow_mut().router = Some((shutdown.clone(), Handle::current()));
    Server::bind(args.try_into()?)
        .await?
        .serve(shutdown)
        .await?;
    // What it has sent last is on its way.
    pending().await
}

/// The clients: the load while things go wrong, and a little when all is quiet again.
async fn load(
    report: Shared,
    network: Network,
    plans: Vec<Plan>,
    workers: Vec<Held>,
) -> turmoil::Result {
    let start = Instant::now();
    let config = ClientConfig {
        network: network.clone(),
        ..ClientConfig::default()
    };
    let channel = net::channel(&format!("{ROUTER}:{ROUTER_PORT}").parse()?, &config)?;
    sleep(START - Duration::from_millis(500)).await;
    // The load's connection is open from here on.
    let mut client = InferenceClient::new(channel);
    client.list_models(ListModelsRequest {}).await?;
    let see = async || {
        let runtime = report
            .borrow()
            .router
            .as_ref()
            .map(|(_, runtime)| runtime.clone());
        let look = look(&runtime.ok_or("there is no router")?, &network, &workers).await?;
        report.borrow_mut().looks.push(look);
        turmoil::Result::Ok(())
    };
    see().await?;
    let asked = plans
        .into_iter()
        .map(|plan| tokio::spawn(ask(client.clone(), plan, start)));
    let asked = join_all(asked.collect::<Vec<_>>());
    let calm = async {
        sleep_until(start + CALM + QUIET - Duration::from_secs(1)).await;
        see().await
    };
    let (outcomes, calm) = tokio::join!(asked, calm);
    calm?;
    report.borrow_mut().outcomes = outcomes.into_iter().collect::<Result<_, _>>()?;
    sleep(Duration::from_secs(1)).await;
    see().await?;
    end(&report, &client, &workers).await
}

/// Ends every process in order, the router first: it still answers what it was asked.
async fn end(
    report: &Shared,
    client: &InferenceClient<Channel>,
    workers: &[Held],
) -> turmoil::Result {
    let mut rng = StdRng::seed_from_u64(1);
    let start = Instant::now();
    let plans = (LAST_IDS..LAST_IDS + 4).map(|id| Plan::whole(id, Duration::ZERO, &mut rng));
    let asked = join_all(plans.map(|plan| tokio::spawn(ask(client.clone(), plan, start))));
    let asked = tokio::spawn(asked);
    sleep(Duration::from_millis(100)).await;
    let router = report.borrow().router.clone();
    let router = router.map(|(shutdown, _)| (ROUTER.to_owned(), shutdown));
    let workers = workers.iter().enumerate().filter_map(|(w, held)| {
        let shutdown = held.lock().unwrap().shutdown.clone()?;
        Some((host(w), shutdown))
    });
    for (name, shutdown) in router.into_iter().chain(workers) {
        shutdown.start();
        if shutdown.finished(Duration::from_secs(10)).await {
            report.borrow_mut().finished.push(name);
        }
    }
    for outcome in asked.await? {
        report.borrow_mut().outcomes.push(outcome?);
    }
    Ok(())
}
