//! The cluster as operators see it.

use std::collections::BTreeMap;

use shoal_fabric::membership;
use shoal_proto::{
    admin::{GetLoadResponse, GetStatusResponse, Group, Load, ModelLoad, Router, State},
    worker::{self, WorkerState},
};

use crate::{service::Service, worker::Worker};

/// Everything that this router knows now.
pub(crate) fn status(service: &Service) -> GetStatusResponse {
    let workers = service.cluster.workers();
    let mut groups: Vec<Group> = workers.iter().map(|worker| group(worker)).collect();
    groups.sort_by(|a, b| (&a.model, &a.name).cmp(&(&b.model, &b.name)));
    let routers = service.cluster.routers();
    let (running, waiting) = service.open_work();
    GetStatusResponse {
        router: Some(router(&service.own.borrow())),
        routers: routers.iter().map(router).collect(),
        groups,
        running,
        waiting,
    }
}

/// What autoscaling needs of it.
pub(crate) fn load(service: &Service) -> GetLoadResponse {
    let mut models = BTreeMap::<String, Vec<Group>>::new();
    for worker in service.cluster.workers().iter() {
        let group = group(worker);
        models.entry(group.model.clone()).or_default().push(group);
    }
    // Of those nobody knows yet what they serve.
    models.remove("");
    let models = models.into_iter().map(|(model, groups)| ModelLoad {
        ready: groups.iter().filter(|g| is_ready(g)).count() as u32,
        groups: groups.len() as u32,
        load: Some(sum(groups.iter().filter_map(|group| group.load.as_ref()))),
        model,
    });
    let (running, waiting) = service.open_work();
    GetLoadResponse {
        models: models.collect(),
        running,
        waiting,
    }
}

fn is_ready(group: &Group) -> bool {
    group.connected && group.state() == State::Ready
}

fn sum<'a>(loads: impl Iterator<Item = &'a Load>) -> Load {
    let mut count = 0;
    let mut sum = loads.fold(Load::default(), |sum, load| {
        count += 1;
        Load {
            running: sum.running + load.running,
            waiting: sum.waiting + load.waiting,
            kv_usage: sum.kv_usage + load.kv_usage,
            prefill_tps: sum.prefill_tps + load.prefill_tps,
            decode_tps: sum.decode_tps + load.decode_tps,
            step_ms_p50: sum.step_ms_p50.max(load.step_ms_p50),
            step_ms_p99: sum.step_ms_p99.max(load.step_ms_p99),
        }
    });
    sum.kv_usage /= f64::from(count.max(1));
    sum
}

fn router(member: &membership::Member) -> Router {
    Router {
        name: member.name.clone(),
        address: member.address.to_string(),
        state: state(member.state).into(),
    }
}

/// A group by its own word, else by the membership's.
fn group(worker: &Worker) -> Group {
    let member = worker.member();
    let capabilities = &member.capabilities;
    let known = Group {
        name: worker.group.to_string(),
        address: worker.address.to_string(),
        model: member.model.clone(),
        state: state(member.state).into(),
        retired: worker.is_retired(),
        breaker_open: worker.breaker.is_open(),
        epoch: member.epoch,
        numerics_id: member.numerics_id.clone(),
        backend: capabilities.backend.clone(),
        quantization: capabilities.quantization.clone(),
        tensor_parallel: capabilities.tensor_parallel,
        context_length: capabilities.context_length,
        pages: capabilities.pages,
        ..Group::default()
    };
    let Some(connected) = worker.connected() else {
        return known;
    };
    let description = &connected.model.description;
    let state = match connected.state() {
        WorkerState::Unspecified => State::Unspecified,
        WorkerState::Starting => State::Starting,
        WorkerState::Ready => State::Ready,
        WorkerState::Draining => State::Draining,
    };
    Group {
        model: description.model.clone(),
        state: state.into(),
        connected: true,
        epoch: description.epoch,
        numerics_id: description.numerics_hex(),
        backend: description.backend.clone(),
        quantization: description.quantization.clone(),
        tensor_parallel: description.tensor_parallel,
        context_length: description.context_length,
        pages: description.pages,
        placed: connected.session.placed().sequences,
        load: Some(reported(&connected.load())),
        ..known
    }
}

fn reported(load: &worker::Load) -> Load {
    Load {
        running: load.running,
        waiting: load.waiting,
        kv_usage: load.kv_usage,
        prefill_tps: load.prefill_tps,
        decode_tps: load.decode_tps,
        step_ms_p50: load.step_ms_p50,
        step_ms_p99: load.step_ms_p99,
    }
}

fn state(state: membership::State) -> State {
    match state {
        membership::State::Unknown => State::Unspecified,
        membership::State::Starting => State::Starting,
        membership::State::Ready => State::Ready,
        membership::State::Draining => State::Draining,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_add_up_to_one() {
        let one = Load {
            running: 2,
            waiting: 1,
            kv_usage: 0.5,
            decode_tps: 100.0,
            step_ms_p99: 7.0,
            ..Load::default()
        };
        let other = Load {
            kv_usage: 0.1,
            step_ms_p99: 9.0,
            ..one
        };
        let sum = sum([one, other].iter());
        assert_eq!((sum.running, sum.waiting), (4, 2));
        assert!((sum.kv_usage - 0.3).abs() < 1e-12);
        assert_eq!((sum.decode_tps, sum.step_ms_p99), (200.0, 9.0));
        assert_eq!(super::sum([].iter()), Load::default());
    }
}
