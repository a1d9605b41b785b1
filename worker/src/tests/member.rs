//! What the worker tells the membership.

use std::sync::{Arc, Mutex};

use futures::future::{BoxFuture, FutureExt};
use shoal_fabric::membership::{Member, Membership, Registration, Role, State, Static, View};
use shoal_proto::worker::{DescribeRequest, DrainRequest, UndrainRequest};
use tokio::sync::watch;

use super::rig::{Rig, in_time};

const EPOCH: u64 = 77;

/// Keeps what is registered.
#[derive(Debug, Default)]
struct Listener(Mutex<Option<watch::Receiver<Member>>>);

impl Membership for Listener {
    fn watch(&self) -> watch::Receiver<Arc<View>> {
        Static::new([]).watch()
    }

    fn register(&self, own: watch::Receiver<Member>) -> Registration {
        *self.0.lock().unwrap() = Some(own);
        Registration::default()
    }

    fn next_epoch<'a>(&'a self, group: &'a str, _: u64) -> BoxFuture<'a, u64> {
        assert_eq!(group, "blue");
        std::future::ready(EPOCH).boxed()
    }
}

#[tokio::test]
async fn the_record_follows_the_worker() {
    let listener = Arc::new(Listener::default());
    let membership = listener.clone();
    let rig = Rig::with(|config| {
        config.membership = membership;
        config.group = Some("blue".into());
        config.advertise = Some("gpu-0:9090".parse().unwrap());
    })
    .await;
    let mut client = rig.client();
    let description = client.describe(DescribeRequest {}).await.unwrap();
    assert_eq!(description.get_ref().epoch, EPOCH);

    let mut record = listener.0.lock().unwrap().clone().unwrap();
    let mut becomes = async |state| {
        let seen = in_time(record.wait_for(|member| member.state == state)).await;
        seen.unwrap().clone()
    };
    let ready = becomes(State::Ready).await;
    assert_eq!((&*ready.name, ready.role), ("blue", Role::Worker));
    assert_eq!(ready.address.to_string(), "gpu-0:9090");
    assert_eq!((&*ready.model, ready.epoch), ("fake", EPOCH));
    assert_eq!(ready.numerics_id.len(), 64);
    assert!(ready.capabilities.pages > 0 && ready.capabilities.tensor_parallel == 1);

    client.drain(DrainRequest { deadline_ms: 0 }).await.unwrap();
    becomes(State::Draining).await;
    client.undrain(UndrainRequest {}).await.unwrap();
    becomes(State::Ready).await;
    rig.end().await.unwrap();
}
