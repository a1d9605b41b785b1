//! A small etcd: keys with revisions, a history that can be compacted, leases that expire.
//!
//! What it knows outlives its process, as etcd's disk does; leases start anew with it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::Router;
use futures::{Stream, StreamExt, stream::BoxStream};
use shoal_fabric::{
    membership::EtcdConfig,
    net::{self, Limits, ListenConfig, Network},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, service::Routes};

use pb::{
    Event, KeyValue, event::EventType, kv_server::KvServer, lease_server::LeaseServer,
    watch_request::RequestUnion, watch_server::WatchServer,
};

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod pb {
    tonic::include_proto!("etcdserverpb");
}

const PORT: u16 = 2379;
/// The Shoal cluster's name.
const CLUSTER: &str = "sim";
/// Short, so that leases are lost within a simulation.
const TTL: Duration = Duration::from_secs(3);

/// How processes reach it.
pub(crate) fn config(network: Network) -> EtcdConfig {
    EtcdConfig {
        endpoints: vec![format!("etcd:{PORT}").parse().unwrap()],
        network,
        cluster: CLUSTER.into(),
        login: None,
        tls: None,
        ttl: TTL,
    }
}

/// The key of something under the cluster's root.
pub(crate) fn key(path: &str) -> Vec<u8> {
    format!("/shoal/v1/{CLUSTER}/{path}").into()
}

/// Its disk, and a hand on it.
#[derive(Clone, Default)]
pub(crate) struct Etcd(Arc<Mutex<Store>>);

#[derive(Default)]
struct Store {
    revision: i64,
    compacted: i64,
    keys: BTreeMap<Vec<u8>, Entry>,
    history: Vec<(i64, Event)>,
    leases: BTreeMap<i64, Lease>,
    granted: i64,
    /// The newest revision.
    news: watch::Sender<i64>,
}

struct Entry {
    value: Vec<u8>,
    revision: i64,
    lease: i64,
}

struct Lease {
    ttl: Duration,
    end: Instant,
}

impl Store {
    fn put(&mut self, key: Vec<u8>, value: Vec<u8>, lease: i64) {
        self.revision += 1;
        let revision = self.revision;
        let entry = Entry {
            value: value.clone(),
            revision,
            lease,
        };
        self.keys.insert(key.clone(), entry);
        self.log(EventType::Put, key, value);
    }

    fn delete(&mut self, key: &[u8]) {
        if self.keys.remove(key).is_some() {
            self.revision += 1;
            self.log(EventType::Delete, key.to_vec(), Vec::new());
        }
    }

    fn log(&mut self, kind: EventType, key: Vec<u8>, value: Vec<u8>) {
        let kv = KeyValue {
            key,
            value,
            mod_revision: self.revision,
        };
        let event = Event {
            r#type: kind.into(),
            kv: Some(kv),
        };
        self.history.push((self.revision, event));
        self.news.send_replace(self.revision);
    }

    fn revoke(&mut self, lease: i64) {
        self.leases.remove(&lease);
        let of_lease = self.keys.iter().filter(|(_, entry)| entry.lease == lease);
        let keys: Vec<_> = of_lease.map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.delete(key));
    }

    fn expire(&mut self, now: Instant) {
        let over = self.leases.iter().filter(|(_, lease)| lease.end <= now);
        let over: Vec<i64> = over.map(|(&id, _)| id).collect();
        over.into_iter().for_each(|id| self.revoke(id));
    }
}

fn is_in(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        end => (start..end).contains(&key),
    }
}

impl Etcd {
    fn lock(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap()
    }

    /// An operator's put.
    pub(crate) fn put(&self, path: &str, value: &str) {
        self.lock().put(key(path), value.into(), 0);
    }

    /// An operator's delete.
    pub(crate) fn delete(&self, path: &str) {
        self.lock().delete(&key(path));
    }

    /// Takes the lease of a key away.
    pub(crate) fn revoke(&self, path: &str) {
        let mut store = self.lock();
        let lease = store.keys.get(&key(path)).map(|entry| entry.lease);
        if let Some(lease) = lease.filter(|&lease| lease != 0) {
            store.revoke(lease);
        }
    }

    /// Forgets the history.
    pub(crate) fn compact(&self) {
        let mut store = self.lock();
        store.compacted = store.revision;
        store.history.clear();
    }

    /// The process, until its host crashes.
    pub(crate) async fn serve(self, network: Network) -> turmoil::Result {
        let now = Instant::now();
        for lease in self.lock().leases.values_mut() {
            lease.end = now + lease.ttl;
        }
        let listen = ListenConfig {
            network,
            address: ([0, 0, 0, 0], PORT).into(),
            tls: None,
            limits: Limits::default(),
        };
        let listener = net::bind(&listen).await?;
        let routes = Routes::new(KvServer::new(self.clone()))
            .add_service(LeaseServer::new(self.clone()))
            .add_service(WatchServer::new(self.clone()));
        let app = net::one_port(Router::new(), routes);
        let expiry = async {
            loop {
                tokio::time::sleep(Duration::from_millis(200)).await;
                self.lock().expire(Instant::now());
            }
        };
        tokio::select! {
            biased;
            () = net::serve(listener, app, CancellationToken::new()) => Ok(()),
            () = expiry => Ok(()),
        }
    }

    /// Everything in a range from a revision on, as it comes.
    fn follow(&self, request: pb::WatchCreateRequest) -> BoxStream<'static, pb::WatchResponse> {
        let etcd = self.clone();
        let mut news = self.lock().news.subscribe();
        let mut next = request.start_revision;
        let created = pb::WatchResponse {
            created: true,
            ..pb::WatchResponse::default()
        };
        let changes = async_stream::stream! {
            loop {
                let (events, end) = {
                    let store = etcd.lock();
                    if next <= store.compacted && next < store.revision {
                        let compacted = pb::WatchResponse {
                            canceled: true,
                            compact_revision: store.compacted,
                            ..pb::WatchResponse::default()
                        };
                        (Some(compacted), true)
                    } else {
                        let new = store.history.iter().filter(|(revision, event)| {
                            let key = event.kv.as_ref().map_or(&[][..], |kv| &kv.key);
                            *revision >= next && is_in(key, &request.key, &request.range_end)
                        });
                        let events: Vec<Event> = new.map(|(_, event)| event.clone()).collect();
                        next = store.revision + 1;
                        let response = pb::WatchResponse { events, ..pb::WatchResponse::default() };
                        (Some(response).filter(|r| !r.events.is_empty()), false)
                    }
                };
                if let Some(events) = events {
                    yield events;
                }
                if end || news.changed().await.is_err() {
                    return;
                }
            }
        };
        futures::stream::iter([created]).chain(changes).boxed()
    }
}

#[tonic::async_trait]
impl pb::kv_server::Kv for Etcd {
    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        let (request, store) = (request.into_inner(), self.lock());
        let found = store
            .keys
            .iter()
            .filter(|(key, _)| is_in(key, &request.key, &request.range_end));
        let kvs = found.map(|(key, entry)| KeyValue {
            key: key.clone(),
            value: entry.value.clone(),
            mod_revision: entry.revision,
        });
        let revision = store.revision;
        Ok(Response::new(pb::RangeResponse {
            header: Some(pb::ResponseHeader { revision }),
            kvs: kvs.collect(),
        }))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let (request, mut store) = (request.into_inner(), self.lock());
        if request.lease != 0 && !store.leases.contains_key(&request.lease) {
            return Err(Status::not_found("etcdserver: requested lease not found"));
        }
        store.put(request.key, request.value, request.lease);
        Ok(Response::new(pb::PutResponse {}))
    }

    async fn txn(
        &self,
        request: Request<pb::TxnRequest>,
    ) -> Result<Response<pb::TxnResponse>, Status> {
        let (request, mut store) = (request.into_inner(), self.lock());
        let holds = |compare: &pb::Compare| {
            let revision = store.keys.get(&compare.key).map_or(0, |e| e.revision);
            compare.target_union == Some(pb::compare::TargetUnion::ModRevision(revision))
        };
        let succeeded = request.compare.iter().all(holds);
        for op in request.success.into_iter().filter(|_| succeeded) {
            if let Some(pb::request_op::Request::RequestPut(put)) = op.request {
                store.put(put.key, put.value, put.lease);
            }
        }
        Ok(Response::new(pb::TxnResponse { succeeded }))
    }
}

#[tonic::async_trait]
impl pb::lease_server::Lease for Etcd {
    type LeaseKeepAliveStream = BoxStream<'static, Result<pb::LeaseKeepAliveResponse, Status>>;

    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        let mut store = self.lock();
        let ttl = Duration::from_secs(request.get_ref().ttl as u64);
        store.granted += 1;
        let id = store.granted;
        let end = Instant::now() + ttl;
        store.leases.insert(id, Lease { ttl, end });
        Ok(Response::new(pb::LeaseGrantResponse {
            id,
            error: String::new(),
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        self.lock().revoke(request.get_ref().id);
        Ok(Response::new(pb::LeaseRevokeResponse {}))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let etcd = self.clone();
        let beats = request.into_inner().map(move |beat| {
            let id = beat?.id;
            let ttl = etcd.lock().leases.get_mut(&id).map_or(0, |lease| {
                lease.end = Instant::now() + lease.ttl;
                lease.ttl.as_secs() as i64
            });
            Ok(pb::LeaseKeepAliveResponse { ttl })
        });
        Ok(Response::new(beats.boxed()))
    }
}

#[tonic::async_trait]
impl pb::watch_server::Watch for Etcd {
    type WatchStream = BoxStream<'static, Result<pb::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let etcd = self.clone();
        let changes = request.into_inner().flat_map(move |request| {
            let create = request.ok().and_then(|request| request.request_union);
            match create {
                Some(RequestUnion::CreateRequest(create)) => etcd.follow(create),
                None => futures::stream::empty().boxed(),
            }
        });
        Ok(Response::new(ok(changes).boxed()))
    }
}

fn ok<T>(stream: impl Stream<Item = T>) -> impl Stream<Item = Result<T, Status>> {
    stream.map(Ok)
}
