//! One simulation: the cluster, its load and its faults, and the laws that it must keep.

use std::{
    cell::RefCell, collections::BTreeMap, error::Error, future::pending, rc::Rc, sync::Arc,
    time::Duration,
};

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
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    time::{Instant, sleep, sleep_until},
};
use tonic::{Code, transport::Channel};

use crate::{
    client::{End, Outcome, Plan, ask},
    etcd::{self, Etcd},
    faults::{self, ETCD, LEAST_DELAY, MOST_DELAY, ROUTER, Schedule, Stage, host, is_well},
    network::Turmoil,
    trace::Trace,
    worker::{self, Held, PORT, Settings, undisturbed},
};

/// Time between deliveries of the network.
const TICK: Duration = Duration::from_millis(5);
/// Until all workers are known.
const START: Duration = Duration::from_secs(2);
/// Faults end here.
const CALM: Duration = Duration::from_secs(25);
/// Longer than any patience of the router after that: a breaker is open for 30 s at most.
const QUIET: Duration = Duration::from_secs(60);
/// Longer than anything here takes.
const LONGEST: Duration = Duration::from_secs(180);
const ROUTER_PORT: u16 = 8080;
/// Sequences that the queue of some workers holds.
const FEW_WAITING: usize = 3;
/// Attempts in a row without a new token that a sequence has at most after its first.
const MOST_FRUITLESS: usize = 3;
/// Of the requests that the router is asked just before its end.
const LAST_IDS: u64 = 2000;
/// A request takes no longer, queue and pauses included, where a worker is always well.
const LONGEST_ANSWER: Duration = Duration::from_secs(10);
/// Requests after all is quiet again, for each worker.
const LAST: usize = 6;

/// What is random from now on is so by the seed.
pub(crate) fn prepare(seed: u64) -> Trace {
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(seed));
    Trace::start()
}

/// What a seed draws.
struct Draws {
    workers: usize,
    /// The first worker is spared.
    rock: bool,
    max_running: u32,
    settings: Settings,
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
        settings: Settings {
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
        },
        plans,
    }
}

/// What clients and the router's host tell the checks.
#[derive(Default)]
struct Report {
    outcomes: Vec<Outcome>,
    /// Before the load, when all is quiet, and at the end.
    looks: Vec<Look>,
    router: Option<(Shutdown, Handle)>,
    /// The orderly end left nothing behind.
    finished: Vec<String>,
}

type Shared = Rc<RefCell<Report>>;

/// The cluster at one time.
struct Look {
    /// The router's metrics.
    metrics: BTreeMap<String, f64>,
    /// The router's tasks.
    tasks: usize,
    /// Of each worker: open sessions, steps so far, and whether it has no sequence.
    sessions: Vec<f64>,
    steps: Vec<u64>,
    idle: Vec<bool>,
}

impl Look {
    /// The metrics of that name, whatever their labels, that have another value.
    fn unlike(&self, name: &str, wanted: f64) -> impl Iterator<Item = String> {
        let of_name = self.metrics.iter().filter(move |(full, _)| {
            full.strip_prefix(name)
                .is_some_and(|labels| labels.is_empty() || labels.starts_with('{'))
        });
        of_name
            .filter(move |(_, value)| **value != wanted)
            .map(|(full, value)| format!("{full} is {value}"))
    }
}

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
    tracing::info!(draws.workers, draws.rock, draws.max_running, ?draws.settings, "begins");
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
        let (settings, network) = (draws.settings.clone(), network.clone());
        stage.sim.host(host(w), move || {
            let (settings, network, held) = (settings.clone(), network.clone(), held.clone());
            async move {
                // One after the other, and not at the beginning of time.
                sleep(Duration::from_millis(100 + 50 * w as u64)).await;
                let run = worker::run(host(w), settings, network, held.clone());
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
    check(&draws, &schedule, &report)
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
        let look = look(&report, &network, &workers).await?;
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

async fn look(
    report: &Shared,
    network: &Network,
    workers: &[Held],
) -> Result<Look, Box<dyn Error>> {
    let mut sessions = Vec::new();
    for w in 0..workers.len() {
        let metrics = metrics(network, &host(w), PORT).await?;
        sessions.extend(metrics.get("shoal_worker_sessions"));
    }
    let metrics = metrics(network, ROUTER, ROUTER_PORT).await?;
    // The connection's own task ends.
    sleep(Duration::from_millis(200)).await;
    let report = report.borrow();
    let runtime = report.router.as_ref().map(|(_, runtime)| runtime.metrics());
    let engine = |held: &Held| held.lock().unwrap().engine.clone();
    let engines = || workers.iter().filter_map(engine);
    Ok(Look {
        metrics,
        tasks: runtime.map_or(0, |metrics| metrics.num_alive_tasks()),
        sessions,
        steps: engines().map(|engine| engine.steps()).collect(),
        idle: engines()
            .map(|engine| engine.is_idle() && engine.load().kv_usage == 0.0)
            .collect(),
    })
}

/// The metrics of a process, by their names with labels.
async fn metrics(
    network: &Network,
    host: &str,
    port: u16,
) -> Result<BTreeMap<String, f64>, Box<dyn Error>> {
    let Network::Other(transport) = network else {
        return Err("not the simulated network".into());
    };
    let mut stream = transport.connect(format!("{host}:{port}").parse()?).await?;
    let request = "GET /metrics HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let metrics = text.lines().filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    Ok(metrics.collect())
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

/// The laws that the trace breaks.
pub(crate) fn check_trace(trace: &Trace) -> Vec<String> {
    let mut broken = trace.misplaced();
    let fruitless = trace.fruitless();
    if fruitless > MOST_FRUITLESS {
        broken.push(format!(
            "a sequence went on {fruitless} times without a token"
        ));
    }
    broken
}

/// The laws that were broken.
fn check(draws: &Draws, schedule: &Schedule, report: &Report) -> Vec<String> {
    let mut broken = Vec::new();
    let plans = report.outcomes.iter().map(|outcome| &outcome.plan);
    let expected = undisturbed::answers(plans);
    for outcome in &report.outcomes {
        let id = outcome.plan.id;
        if draws.rock && !outcome.plan.is_slow() && outcome.took > LONGEST_ANSWER {
            broken.push(format!("request {id} took {:?}", outcome.took));
        }
        for (choice, tokens) in (0..).zip(&outcome.tokens) {
            let expected = outcome.plan.answer(&expected[&(id, choice)]);
            let right = match outcome.end {
                End::Complete => tokens == expected,
                End::Failed(..) | End::Left => expected.starts_with(tokens),
            };
            if !right {
                let end = &outcome.end;
                broken.push(format!(
                    "request {id} got {tokens:?}, not {expected:?} ({end:?})"
                ));
            }
        }
        if let End::Failed(code, message) = &outcome.end
            && !may_fail(draws, schedule, outcome, *code)
        {
            let took = outcome.took;
            broken.push(format!(
                "request {id} failed after {took:?}: {code:?}, {message}"
            ));
        }
    }
    let [before, calm, after] = &report.looks[..] else {
        broken.push("the simulation did not come to its end".into());
        return broken;
    };
    for (when, look) in [("when all was quiet", calm), ("at the end", after)] {
        for (name, wanted) in [
            ("shoal_requests_running", 0.0),
            ("shoal_requests_waiting", 0.0),
            ("shoal_worker_sequences", 0.0),
            ("shoal_worker_suspected", 0.0),
            ("shoal_worker_up", 1.0),
            ("shoal_worker_ready", 1.0),
        ] {
            broken.extend(
                look.unlike(name, wanted)
                    .map(|line| format!("{when}: {line}")),
            );
        }
        for w in 0..draws.workers {
            let is_known = look
                .metrics
                .iter()
                .any(|(name, _)| name.contains(&worker_label(w)));
            if !is_known {
                broken.push(format!("{when}: {} is no worker", host(w)));
            }
            if look.sessions[w] != 1.0 {
                let open = look.sessions[w];
                broken.push(format!("{when}: {} has {open} sessions", host(w)));
            }
            if !look.idle[w] {
                broken.push(format!("{when}: {} has sequences of nobody", host(w)));
            }
        }
        let (now, then) = (look.tasks, before.tasks);
        if now > then {
            broken.push(format!(
                "{when}: the router has {now} tasks, {then} before the load"
            ));
        }
    }
    broken.extend(after.unlike("shoal_worker_breaker_open", 0.0));
    for w in 0..draws.workers {
        if calm.steps[w] == after.steps[w] {
            broken.push(format!("{} is not used again", host(w)));
        }
        if !report.finished.contains(&host(w)) {
            broken.push(format!("{} left tasks behind at its end", host(w)));
        }
    }
    if !report.finished.iter().any(|name| name == ROUTER) {
        broken.push("the router left tasks behind at its end".into());
    }
    broken
}

/// A worker in the labels of the router's metrics.
fn worker_label(worker: usize) -> String {
    format!("worker=\"{}:{PORT}\"", host(worker))
}

/// Whether a request may end with an error.
fn may_fail(draws: &Draws, schedule: &Schedule, outcome: &Outcome, code: Code) -> bool {
    let plan = &outcome.plan;
    match code {
        // The second is the word of the client's own clock.
        Code::DeadlineExceeded | Code::Cancelled => plan
            .deadline
            .is_some_and(|deadline| outcome.took + 2 * TICK >= deadline),
        // A queue that is too long for the deadline, or full.
        Code::ResourceExhausted => {
            plan.deadline.is_some() || draws.settings.engine.max_waiting == FEW_WAITING
        }
        // There was nobody to answer it.
        Code::Unavailable => {
            let end = plan.at + outcome.took;
            !(0..draws.workers).any(|w| is_well(schedule, w, plan.at, end))
        }
        _ => false,
    }
}
