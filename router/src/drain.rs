//! Drains and undrains a worker group on behalf of an operator.

use std::{sync::Arc, time::Duration};

use shoal_proto::{
    admin::DrainResponse,
    worker::{self, UndrainRequest, worker_client::WorkerClient},
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Status, transport::Channel};

use crate::{cluster::Cluster, error::RequestError, worker::Worker};

/// For a worker's answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Between looks at a group that drains.
const POLL: Duration = Duration::from_millis(50);

/// Has the group take nothing new. Unfinished sequences are given up after `deadline`, where
/// there is one. With `wait`, returns when nothing is left or the group is gone.
pub(crate) async fn drain(
    cluster: &Cluster,
    group: &str,
    deadline: Option<Duration>,
    wait: bool,
) -> Result<DrainResponse, RequestError> {
    let worker = find(cluster, group)?;
    let end = deadline.map(|deadline| Instant::now() + deadline);
    let mut client = client(&worker)?;
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let deadline_ms = left.map_or(0, |left| {
            u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1)
        });
        // Idempotent: it tells how much is left.
        let answer = call(group, client.drain(worker::DrainRequest { deadline_ms })).await;
        let left = match answer {
            // Gone is drained, for whoever waits.
            Err(_) if wait && worker.connected().is_none() => return Ok(DrainResponse::default()),
            answer => answer?,
        };
        if !wait || left.running + left.waiting == 0 {
            return Ok(DrainResponse {
                running: left.running,
                waiting: left.waiting,
            });
        }
        sleep(POLL).await;
    }
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
