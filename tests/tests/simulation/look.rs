//! What can be seen of the cluster from outside.

use std::{collections::BTreeMap, error::Error, time::Duration};

use shoal_fabric::net::Network;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    time::sleep,
};

use crate::{
    faults::{ROUTER, host},
    worker::{Held, PORT},
    world::ROUTER_PORT,
};

/// The cluster at one time.
pub(crate) struct Look {
    /// The router's metrics.
    pub(crate) metrics: BTreeMap<String, f64>,
    /// The router's tasks.
    pub(crate) tasks: usize,
    /// Of each worker: open sessions, steps so far, and whether it has no sequence.
    pub(crate) sessions: Vec<f64>,
    pub(crate) steps: Vec<u64>,
    pub(crate) idle: Vec<bool>,
}

impl Look {
    /// The metrics of that name, whatever their labels, that have another value.
    pub(crate) fn unlike(&self, name: &str, wanted: f64) -> impl Iterator<Item = String> {
        let of_name = self.metrics.iter().filter(move |(full, _)| {
            full.strip_prefix(name)
                .is_some_and(|labels| labels.is_empty() || labels.starts_with('{'))
        });
        of_name
            .filter(move |(_, value)| **value != wanted)
            .map(|(full, value)| format!("{full} is {value}"))
    }
}

/// Looks at the cluster; the router runs on `runtime`.
pub(crate) async fn look(
    runtime: &Handle,
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
    let engine = |held: &Held| held.lock().unwrap().engine.clone();
    let engines = || workers.iter().filter_map(engine);
    Ok(Look {
        metrics,
        tasks: runtime.metrics().num_alive_tasks(),
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
