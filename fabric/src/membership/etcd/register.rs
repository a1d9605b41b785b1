//! Keeps a process's own record under a lease: the writer's side.

use std::sync::Arc;

use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Member, Shared, backoff,
    client::{Client, EtcdError, Range},
};
use crate::backoff::Backoff;

/// Registers `own` and keeps it up to date until `stop`; then withdraws it. A record that
/// somebody deletes is made anew. A lost lease or connection is followed by a new lease, after a
/// pause that spreads the processes which lost theirs together.
pub(super) async fn keep(
    shared: Arc<Shared>,
    mut own: watch::Receiver<Member>,
    stop: CancellationToken,
) {
    let mut backoff = backoff();
    loop {
        match session(&shared, &mut own, &stop, &mut backoff).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(%error, "not registered with etcd; serving goes on"),
        }
        let pause = sleep(backoff.pause());
        if stop.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// One connection and one lease.
async fn session(
    shared: &Shared,
    own: &mut watch::Receiver<Member>,
    stop: &CancellationToken,
    backoff: &mut Backoff,
) -> Result<(), EtcdError> {
    let ttl = shared.config.ttl;
    let mut client = Client::connect(shared).await?;
    let lease = client.grant(ttl).await?;
    let range = Range::key(shared.record_key(&own.borrow()));
    let (_, revision) = client.list(&range).await?;
    let mut changes = client.watch(&range, revision + 1).await?;
    put(shared, &mut client, own, lease).await?;
    let mut beats = client.keep_alive(lease, ttl).await?;
    tracing::info!(name = own.borrow().name, "registered with etcd");
    backoff.reset();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return client.revoke(lease).await,
            // A sender that is gone leaves the last state standing.
            Ok(()) = own.changed() => put(shared, &mut client, own, lease).await?,
            beat = beats.next() => beat?,
            changes = changes.next() => {
                if changes?.any(|change| change.value.is_none()) {
                    tracing::warn!("the record was deleted; it is made anew");
                    put(shared, &mut client, own, lease).await?;
                }
            }
        }
    }
}

async fn put(
    shared: &Shared,
    client: &mut Client,
    own: &mut watch::Receiver<Member>,
    lease: i64,
) -> Result<(), EtcdError> {
    let member = own.borrow_and_update().clone();
    let value = serde_json::to_vec(&member).map_err(EtcdError::Encode)?;
    client.put(&shared.record_key(&member), value, lease).await
}
