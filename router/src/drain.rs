//! Drains and undrains a worker group on behalf of an operator.

use std::{sync::Arc, time::Duration};

use shoal_proto::{
    admin::DrainResponse,
    worker::{self, DescribeRequest, UndrainRequest, WorkerState, worker_client::WorkerClient},
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Status, transport::Channel};

use crate::{cluster::Cluster, error::RequestError, worker::Worker};

/// For a worker's answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Between looks at a group that drains.
const POLL: Duration = Duration::from_millis(50);

/// Has the group take nothing new. Unfinished sequences are given up after `deadline`, where
/// there is one. With `wait`, returns when nothing is left or the group is gone, and fails when
/// somebody has it take sequences again.
pub(crate) async fn drain(
    cluster: &Cluster,
    group: &str,
    deadline: Option<Duration>,
    wait: bool,
) -> Result<DrainResponse, RequestError> {
    let worker = find(cluster, group)?;
    let deadline_ms = deadline.map_or(0, |deadline| {
        u32::try_from(deadline.as_millis())
            .unwrap_or(u32::MAX)
            .max(1)
    });
    let request = worker::DrainRequest { deadline_ms };
    let left = call(group, client(&worker)?.drain(request)).await?;
    let begun = Instant::now();
    let mut left = DrainResponse {
        running: left.running,
        waiting: left.waiting,
    };
    while wait && left.running + left.waiting > 0 {
        sleep(POLL).await;
        // Gone is drained, for whoever waits.
        let Some(connected) = worker.connected() else {
            return Ok(DrainResponse::default());
        };
        // Asked for, since the session may tell of a change later than the worker answers. Drained
        // once more, it would take back what somebody undrained.
        let mut client = connected.client();
        match call(group, client.describe(DescribeRequest {})).await {
            Ok(now) if now.state() == WorkerState::Draining => {}
            Ok(_) => {
                let group = group.to_owned();
                return Err(RequestError::Undrained { group });
            }
            Err(_) if worker.connected().is_none() => return Ok(DrainResponse::default()),
            Err(error) => return Err(error),
        }
        if let Some(load) = connected.load_since(begun) {
            left.running = load.running;
            left.waiting = load.waiting;
        }
    }
    Ok(left)
}

/// Has the group take sequences again.
pub(crate) async fn undrain(cluster: &Cluster, group: &str) -> Result<(), RequestError> {
    let worker = find(cluster, group)?;
    let mut client = client(&worker)?;
    call(group, client.undrain(UndrainRequest {})).await?;
    Ok(())
}

fn find(cluster: &Cluster, group: &str) -> Result<Arc<Worker>, RequestError> {
    let workers = cluster.workers();
    // A retired one may bear the name of its successor.
    let named = |retired| {
        let mut workers = workers.iter();
        workers.find(|w| *w.group == *group && w.is_retired() == retired)
    };
    let found = named(false).or_else(|| named(true));
    found.cloned().ok_or_else(|| RequestError::GroupNotFound {
        group: group.to_owned(),
    })
}

fn client(worker: &Worker) -> Result<WorkerClient<Channel>, RequestError> {
    let connected = worker.connected();
    let connected = connected.ok_or_else(|| RequestError::GroupUnreachable {
        group: worker.group.to_string(),
        reason: "it is not connected".to_owned(),
    })?;
    Ok(connected.client())
}

async fn call<T>(
    group: &str,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, RequestError> {
    let answer = timeout(CALL_TIMEOUT, call).await;
    let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("it does not answer")));
    let answer = answer.map_err(|status| RequestError::GroupUnreachable {
        group: group.to_owned(),
        reason: status.message().to_owned(),
    })?;
    Ok(answer.into_inner())
}
