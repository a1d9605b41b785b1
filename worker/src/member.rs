//! The worker as a member of the cluster: what it tells of itself, and how it follows what
//! operators want of it.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use shoal_fabric::membership::{
    Capabilities, Intent, Member, Membership, Registration, Role, State,
};
use shoal_proto::worker::{ModelDescription, WorkerState};
use tokio::sync::watch;

use crate::{
    config::{WorkerConfig, WorkerRole},
    error::WorkerError,
    worker::Worker,
};

/// Makes the worker known as `member`, and keeps what is known of it up to date until it
/// closes.
pub(crate) fn join(
    worker: &Arc<Worker>,
    membership: &dyn Membership,
    mut member: Member,
) -> Registration {
    member.state = State::Starting;
    let (own, record) = watch::channel(member);
    let registration = membership.register(record);
    let tell = tell(worker.clone(), own);
    let obey = obey(worker.clone(), registration.intent());
    let follow = async { tokio::join!(tell, obey) };
    let follow = worker.closing.clone().run_until_cancelled_owned(follow);
    worker.shutdown.spawn(follow);
    registration
}

impl WorkerConfig {
    /// The worker that listens at `address`, as it is before its model is loaded.
    pub(crate) fn member(&self, address: SocketAddr) -> Result<Member, WorkerError> {
        let (name, advertise) = (self.group.as_deref(), self.advertise.as_ref());
        let role = match self.role {
            WorkerRole::Serve => Role::Worker,
            WorkerRole::Draft => Role::Draft,
        };
        let mut member = Member::own(role, name, advertise, address)?;
        member.model = self.served_name()?;
        Ok(member)
    }
}

/// Follows the worker's state.
async fn tell(worker: Arc<Worker>, own: watch::Sender<Member>) {
    let mut state = worker.watch();
    loop {
        let now = *state.borrow_and_update();
        own.send_if_modified(|member| {
            let before = member.clone();
            member.state = match now {
                WorkerState::Unspecified => State::Unknown,
                WorkerState::Starting => State::Starting,
                WorkerState::Ready => State::Ready,
                WorkerState::Draining => State::Draining,
            };
            if let Some(serving) = worker.known() {
                describe(member, &serving.description);
            }
            *member != before
        });
        if state.changed().await.is_err() {
            return;
        }
    }
}

fn describe(member: &mut Member, description: &ModelDescription) {
    member.epoch = description.epoch;
    member.capabilities = Capabilities {
        tensor_parallel: description.tensor_parallel,
        backend: description.backend.clone(),
        quantization: description.quantization.clone(),
        context_length: description.context_length,
        pages: description.pages,
    };
    member.numerics_id = description.numerics_hex();
}

/// Drains and undrains as operators want it.
async fn obey(worker: Arc<Worker>, mut intent: watch::Receiver<Option<Intent>>) {
    let Ok(serving) = worker.serving().await else {
        return;
    };
    let mut drained = false;
    loop {
        match *intent.borrow_and_update() {
            Some(Intent::Drain { deadline }) => {
                tracing::info!("operators want this worker drained");
                worker.drain(&serving, deadline.map(until));
                drained = true;
            }
            None if drained => {
                tracing::info!("operators want this worker back");
                // A worker that ends stays drained.
                drained = worker.undrain(&serving).is_err();
            }
            None => {}
        }
        if intent.changed().await.is_err() {
            return;
        }
    }
}

/// The time until so many milliseconds after 1970; none if that is past.
fn until(unix_ms: u64) -> Duration {
    let then = SystemTime::UNIX_EPOCH + Duration::from_millis(unix_ms);
    then.duration_since(SystemTime::now()).unwrap_or_default()
}
