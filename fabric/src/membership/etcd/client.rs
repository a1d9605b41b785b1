//! One connection to one member of etcd.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::{StreamExt, wrappers::IntervalStream};
use tonic::{
    Request, Status, Streaming,
    metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use super::Shared;
use crate::net::{self, ClientConfig, NetError};
use pb::{
    auth_client::AuthClient, event::EventType, kv_client::KvClient, lease_client::LeaseClient,
    watch_client::WatchClient,
};

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod pb {
    tonic::include_proto!("etcdserverpb");
}

/// For the answer to a call.
const CALL: Duration = Duration::from_secs(3);

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub(super) enum EtcdError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("etcd: {0}")]
    Status(#[from] Status),
    #[error("etcd did not answer within {CALL:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
    #[error("etcd's token cannot be a header")]
    Token(#[from] InvalidMetadataValue),
    #[error("the record cannot be written as JSON")]
    Encode(#[source] serde_json::Error),
    #[error("etcd gave no lease: {0}")]
    NoLease(String),
    #[error("the lease is lost")]
    LeaseLost,
    #[error("etcd has compacted the history up to revision {0}")]
    Compacted(i64),
    #[error("etcd ended the watch: {0}")]
    Cancelled(String),
    #[error("etcd closed the stream")]
    Closed,
}

/// A key, or all keys with one prefix.
#[derive(Clone, Debug)]
pub(super) struct Range {
    key: Vec<u8>,
    end: Vec<u8>,
}

impl Range {
    pub(super) fn key(key: Vec<u8>) -> Self {
        let end = Vec::new();
        Self { key, end }
    }

    /// The prefix ends in a byte below 255.
    pub(super) fn prefix(key: Vec<u8>) -> Self {
        let mut end = key.clone();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self { key, end }
    }
}

/// A key's new value, or its end.
pub(super) struct Change {
    pub(super) key: Vec<u8>,
    pub(super) value: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
struct Headers(Option<MetadataValue<Ascii>>);

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        // A member that lost its cluster says so, in the place of silence.
        metadata.insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.0 {
            metadata.insert("token", token.clone());
        }
        Ok(request)
    }
}

type Intercepted = InterceptedService<Channel, Headers>;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Client {
    kv: KvClient<Intercepted>,
    lease: LeaseClient<Intercepted>,
    watch: WatchClient<Intercepted>,
}

impl Client {
    /// To the next member in turn, authenticated.
    pub(super) async fn connect(shared: &Shared) -> Result<Self, EtcdError> {
        let config = ClientConfig {
            network: shared.config.network.clone(),
            tls: shared.config.tls.clone(),
            connect_timeout: CALL,
            keepalive_interval: CALL,
            keepalive_timeout: CALL,
        };
        let channel = net::channel(shared.endpoint(), &config)?;
        let token = match &shared.config.login {
            None => None,
            Some(login) => {
                let request = pb::AuthenticateRequest {
                    name: login.user.clone(),
                    password: login.password.clone(),
                };
                let mut auth = AuthClient::new(channel.clone());
                let answer = timeout(CALL, auth.authenticate(request)).await??;
                let mut token: MetadataValue<Ascii> = answer.into_inner().token.parse()?;
                token.set_sensitive(true);
                Some(token)
            }
        };
        let channel = InterceptedService::new(channel, Headers(token));
        Ok(Self {
            kv: KvClient::new(channel.clone()),
            lease: LeaseClient::new(channel.clone()),
            watch: WatchClient::new(channel),
        })
    }

    /// All entries, and the revision that they are of.
    pub(super) async fn list(
        &mut self,
        range: &Range,
    ) -> Result<(Vec<(Vec<u8>, Vec<u8>)>, i64), EtcdError> {
        let answer = self.range(range).await?;
        let revision = answer.header.map_or(0, |header| header.revision);
        let entries = answer.kvs.into_iter().map(|kv| (kv.key, kv.value));
        Ok((entries.collect(), revision))
    }

    async fn range(&mut self, range: &Range) -> Result<pb::RangeResponse, EtcdError> {
        let request = pb::RangeRequest {
            key: range.key.clone(),
            range_end: range.end.clone(),
        };
        Ok(timeout(CALL, self.kv.range(request)).await??.into_inner())
    }

    /// Every change from `revision` on.
    pub(super) async fn watch(
        &mut self,
        range: &Range,
        revision: i64,
    ) -> Result<Changes, EtcdError> {
        let create = pb::WatchCreateRequest {
            key: range.key.clone(),
            range_end: range.end.clone(),
            start_revision: revision,
        };
        let request = pb::WatchRequest {
            request_union: Some(pb::watch_request::RequestUnion::CreateRequest(create)),
        };
        // The end of the requests would be the end of the watch.
        let requests = tokio_stream::once(request).chain(tokio_stream::pending());
        let answer = timeout(CALL, self.watch.watch(requests)).await??;
        Ok(Changes(answer.into_inner()))
    }

    /// A lease of so many whole seconds.
    pub(super) async fn grant(&mut self, ttl: Duration) -> Result<i64, EtcdError> {
        let request = pb::LeaseGrantRequest {
            ttl: ttl.as_secs().try_into().unwrap_or(i64::MAX),
        };
        let answer = timeout(CALL, self.lease.lease_grant(request)).await??;
        let answer = answer.into_inner();
        match answer.error.is_empty() {
            true => Ok(answer.id),
            false => Err(EtcdError::NoLease(answer.error)),
        }
    }

    /// Renews the lease three times within `ttl`.
    pub(super) async fn keep_alive(
        &mut self,
        lease: i64,
        ttl: Duration,
    ) -> Result<Beats, EtcdError> {
        let mut ticks = interval(ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let beats =
            IntervalStream::new(ticks).map(move |_| pb::LeaseKeepAliveRequest { id: lease });
        let answer = timeout(CALL, self.lease.lease_keep_alive(beats)).await??;
        Ok(Beats {
            stream: answer.into_inner(),
            ttl,
        })
    }

    /// Ends the lease and everything under it.
    pub(super) async fn revoke(&mut self, lease: i64) -> Result<(), EtcdError> {
        let request = pb::LeaseRevokeRequest { id: lease };
        timeout(CALL, self.lease.lease_revoke(request)).await??;
        Ok(())
    }

    /// Sets a key, for as long as the lease lives.
    pub(super) async fn put(
        &mut self,
        key: &[u8],
        value: Vec<u8>,
        lease: i64,
    ) -> Result<(), EtcdError> {
        let request = pb::PutRequest {
            key: key.to_vec(),
            value,
            lease,
        };
        timeout(CALL, self.kv.put(request)).await??;
        Ok(())
    }

    /// Raises the number at `key` by compare-and-swap, to `least` or more; the new number.
    pub(super) async fn raise(&mut self, key: &[u8], least: u64) -> Result<u64, EtcdError> {
        loop {
            let range = Range::key(key.to_vec());
            let known = self.range(&range).await?.kvs.into_iter().next();
            let number = known.as_ref().and_then(|kv| {
                let text = std::str::from_utf8(&kv.value).ok()?;
                text.parse::<u64>().ok()
            });
            let next = number.map_or(least, |n| n.saturating_add(1).max(least));
            // A key that is not there has revision 0.
            let revision = known.map_or(0, |kv| kv.mod_revision);
            let put = pb::PutRequest {
                key: key.to_vec(),
                value: next.to_string().into(),
                lease: 0,
            };
            let request = pb::TxnRequest {
                compare: vec![pb::Compare {
                    result: pb::compare::CompareResult::Equal.into(),
                    target: pb::compare::CompareTarget::Mod.into(),
                    key: key.to_vec(),
                    target_union: Some(pb::compare::TargetUnion::ModRevision(revision)),
                }],
                success: vec![pb::RequestOp {
                    request: Some(pb::request_op::Request::RequestPut(put)),
                }],
            };
            if timeout(CALL, self.kv.txn(request))
                .await??
                .into_inner()
                .succeeded
            {
                return Ok(next);
            }
        }
    }
}

/// The changes of a range.
pub(super) struct Changes(Streaming<pb::WatchResponse>);

impl Changes {
    /// Waits for the next ones. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<impl Iterator<Item = Change> + use<>, EtcdError> {
        let answer = self.0.message().await?.ok_or(EtcdError::Closed)?;
        if answer.compact_revision > 0 {
            return Err(EtcdError::Compacted(answer.compact_revision));
        }
        if answer.canceled {
            return Err(EtcdError::Cancelled(answer.cancel_reason));
        }
        Ok(answer.events.into_iter().filter_map(|event| {
            let put = event.r#type() == EventType::Put;
            let kv = event.kv?;
            Some(Change {
                key: kv.key,
                value: put.then_some(kv.value),
            })
        }))
    }
}

/// The renewals of a lease.
pub(super) struct Beats {
    stream: Streaming<pb::LeaseKeepAliveResponse>,
    ttl: Duration,
}

impl Beats {
    /// Waits for the next renewal. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<(), EtcdError> {
        let beat = timeout(self.ttl, self.stream.message()).await;
        let beat = beat.map_err(|_| EtcdError::LeaseLost)??;
        match beat.ok_or(EtcdError::Closed)?.ttl {
            1.. => Ok(()),
            _ => Err(EtcdError::LeaseLost),
        }
    }
}
