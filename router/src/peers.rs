//! The other routers: a link to each, over which their logs of text that drafts come.

use std::{
    collections::HashSet,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use shoal_fabric::{
    backoff::Backoff,
    membership::{Endpoint, Membership, View},
    net::{self, ClientConfig, NetError},
    shutdown::Shutdown,
};
use shoal_proto::router::{FollowRequest, router_client::RouterClient};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};
use tonic::{Request, Status, metadata::AsciiMetadataValue};

use crate::{
    corpus::{Corpora, WireError},
    metrics::Metrics,
};

/// Largest batch of a log: a public text is one entry.
const MAX_BATCH: usize = 256 << 20;
/// Between questions for the logs of others than the one that is asked.
const ASK_AGAIN: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// How the other routers are reached.
#[derive(Clone, Debug)]
pub(crate) struct PeerConfig {
    pub(crate) client: ClientConfig,
    /// The `Authorization` that they ask for.
    pub(crate) authorization: Option<AsciiMetadataValue>,
    /// Those that no membership tells of; this router may be among them.
    pub(crate) addresses: Vec<Endpoint>,
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("{0}")]
    Status(#[from] Status),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the books broke off")]
    Join(#[from] tokio::task::JoinError),
    #[error("it ended")]
    Ended,
    #[error("it is this router itself")]
    Own,
}

/// Every router that is known.
struct Peers {
    config: PeerConfig,
    corpora: Arc<Corpora>,
    metrics: Metrics,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// As the membership tells of them.
    wanted: HashSet<Endpoint>,
    /// Those with a link, up or down.
    kept: HashSet<Endpoint>,
}

/// Follows every other router until the corpora close.
pub(crate) fn start(
    membership: &dyn Membership,
    own: Endpoint,
    config: PeerConfig,
    corpora: Arc<Corpora>,
    metrics: Metrics,
    shutdown: &Shutdown,
) {
    let closing = corpora.closing.clone();
    let peers = Arc::new(Peers {
        config,
        corpora,
        metrics,
        table: Mutex::default(),
    });
    let mut members = membership.watch();
    let (tasks, stop) = (shutdown.clone(), closing.clone());
    shutdown.spawn(closing.run_until_cancelled_owned(async move {
        loop {
            let view = members.borrow_and_update().clone();
            for address in peers.follow(&view, &own) {
                let keep = keep(peers.clone(), address);
                tasks.spawn(stop.clone().run_until_cancelled_owned(keep));
            }
            if members.changed().await.is_err() {
                // The list is final.
                return;
            }
        }
    }));
}

impl Peers {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a view over. Returns the routers that are new: they have no link yet.
    fn follow(&self, view: &View, own: &Endpoint) -> Vec<Endpoint> {
        let told = view.routers.iter().map(|member| &member.address);
        let all = told.chain(&self.config.addresses);
        let wanted = all.filter(|address| *address != own).cloned().collect();
        let mut table = self.table();
        table.wanted = wanted;
        let new: Vec<_> = table.wanted.difference(&table.kept).cloned().collect();
        table.kept.extend(new.iter().cloned());
        new
    }

    /// Lets go of a router whose link is down, unless it is a member.
    fn forget(&self, address: &Endpoint) -> bool {
        let mut table = self.table();
        !table.wanted.contains(address) && table.kept.remove(address)
    }

    fn ask(&self) -> FollowRequest {
        FollowRequest {
            origin: self.corpora.origin,
            positions: self.corpora.positions().into_iter().collect(),
        }
    }

    /// One link, from its first question to its loss.
    async fn once(&self, address: &Endpoint) -> Result<Infallible, LinkError> {
        let channel = net::channel(address, &self.config.client)?;
        let mut client = RouterClient::new(channel).max_decoding_message_size(MAX_BATCH);
        let (ask, mut asked) = mpsc::channel(1);
        let first = self.ask();
        let mut request = Request::new(async_stream::stream! {
            yield first;
            while let Some(request) = asked.recv().await {
                yield request;
            }
        });
        if let Some(authorization) = &self.config.authorization {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", authorization.clone());
        }
        let mut losses = self.corpora.watch_losses();
        let mut batches = client.follow(request).await?.into_inner();
        let name: Arc<str> = address.to_string().into();
        let metrics = self.metrics.peer(name.clone());
        let mut again = interval(ASK_AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        again.reset();
        let mut followed = None;
        loop {
            let batch = tokio::select! {
                batch = batches.message() => batch?.ok_or(LinkError::Ended)?,
                // Where it is asked already, that will do.
                _ = again.tick() => {
                    let _ = ask.try_send(self.ask());
                    continue;
                }
                Ok(()) = losses.changed() => {
                    let _ = ask.try_send(self.ask());
                    continue;
                }
            };
            let (origin, entries, end) = (batch.origin, batch.entries.len(), batch.end);
            if origin == self.corpora.origin {
                return Err(LinkError::Own);
            }
            if followed.is_none() {
                tracing::info!(router = %address, "router followed");
                followed = Some(self.corpora.follow(origin, name.clone()));
            }
            let known = batch.positions.get(&origin).copied().unwrap_or(end);
            let corpora = self.corpora.clone();
            tokio::task::spawn_blocking(move || corpora.take(batch)).await??;
            metrics.received.inc_by(entries as u64);
            metrics.lag.set(end.saturating_sub(known) as i64);
        }
    }
}

/// Follows a router, and again after a loss with jittered exponential backoff; ends when its
/// future is dropped, or after a loss when the router is no member any more.
async fn keep(peers: Arc<Peers>, address: Endpoint) {
    let mut backoff = Backoff::new(FIRST_BACKOFF, LONGEST_BACKOFF);
    let mut failing = false;
    loop {
        let Err(error) = peers.once(&address).await;
        match error {
            // A list of all routers may be the same for each of them.
            LinkError::Own => return,
            LinkError::Ended => {
                tracing::info!(router = %address, "router followed no longer");
                backoff.reset();
            }
            error if !failing => tracing::warn!(router = %address, %error, "router not followed"),
            error => tracing::debug!(router = %address, %error, "still not followed"),
        }
        failing = true;
        if peers.forget(&address) {
            return;
        }
        sleep(backoff.pause()).await;
    }
}
