//! Ranks on machines of their own, as far as one process shows them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use shoal_collective::tcp::{HelloError, Refusal};
use shoal_engine::backend::BackendError;
use shoal_fabric::shutdown::Shutdown;
use shoal_gguf::{
    GgmlType,
    testmodel::{Family, TestModel},
};
use shoal_proto::worker::Finish;
use tempfile::TempDir;

use super::rig::{self, Rig, in_time, submit};
use crate::{
    ConfigError, GroupConfig, GroupError, LoadError, Others, Payload, RankConfig, RemoteConfig,
    WorkerConfig, WorkerError, join_group, load,
};

fn small(seed: u64) -> Vec<u8> {
    let model = TestModel {
        seed,
        ..TestModel::tiny(Family::Llama, GgmlType::Q4_1)
    };
    model.build().unwrap().to_bytes()
}

/// Files of a group, which are gone with the test.
struct Group {
    folder: TempDir,
    listen: SocketAddr,
}

impl Group {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.gguf"), small(1)).unwrap();
        std::fs::write(folder.path().join("secret"), "known to the ranks alone").unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = free.local_addr().unwrap();
        Self { folder, listen }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn worker(&self) -> WorkerConfig {
        WorkerConfig {
            model: self.path("model.gguf"),
            kv_bytes: Some(1 << 20),
            tensor_parallel: Some(GroupConfig {
                ranks: 2,
                others: Others::Remote(RemoteConfig {
                    listen: self.listen,
                    secret: self.path("secret"),
                    payload: Payload::Bf16,
                }),
                patience: Duration::from_secs(20),
            }),
            ..rig::config()
        }
    }

    fn rank(&self) -> RankConfig {
        RankConfig {
            model: self.path("model.gguf"),
            rank: 1,
            world: 2,
            join: self.listen.to_string().parse().unwrap(),
            listen: ([127, 0, 0, 1], 0).into(),
            probes: None,
            secret: self.path("secret"),
            isa: None,
            threads: None,
        }
    }
}

/// Why a rank does not stay.
async fn refused(config: RankConfig) -> GroupError {
    match in_time(join_group(config, Shutdown::new())).await {
        Err(WorkerError::Group(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn ranks_that_belong_come_in_and_others_learn_why_not() {
    let group = Group::new();
    let rig = Rig::running(group.worker()).await;

    std::fs::write(group.path("other"), "known to nobody else").unwrap();
    let error = refused(RankConfig {
        secret: group.path("other"),
        ..group.rank()
    });
    let secret = |error| {
        matches!(
            error,
            GroupError::Join {
                source: HelloError::Secret
            }
        )
    };
    assert!(secret(error.await));

    let error = refused(RankConfig {
        world: 3,
        ..group.rank()
    });
    let refusal = |error| match error {
        GroupError::Join {
            source: HelloError::Refused(refusal),
        } => refusal,
        other => panic!("{other}"),
    };
    assert_eq!(refusal(error.await), Refusal::World { ours: 2 });

    std::fs::write(group.path("other.gguf"), small(2)).unwrap();
    let error = refused(RankConfig {
        model: group.path("other.gguf"),
        ..group.rank()
    });
    assert!(matches!(error.await, GroupError::Different { rank: 1 }));
    assert_eq!(rig.get("/ready").await.0, 503, "it waits for a rank");

    let stay = Shutdown::new();
    let config = RankConfig {
        probes: Some(rig::config().listen),
        ..group.rank()
    };
    let rank = tokio::spawn(join_group(config, stay.clone()));
    let mut phase = stay.phase();
    let bound = in_time(phase.wait_for(|phase| phase.address.is_some()));
    let probes = bound.await.unwrap().address.unwrap();
    assert_eq!(rig::get(probes, "/live").await.0, 200);
    assert_eq!(rig.description().await.tensor_parallel, 2);
    let taken = refusal(refused(group.rank()).await);
    assert_eq!(taken, Refusal::Taken);
    let mut session = rig.session().await;
    session.submit(submit(1, &[1, 2, 3], 10)).await;
    let (tokens, last) = session.answer(1).await;
    assert_eq!((tokens.len(), last.finish()), (10, Finish::Length));
    drop(session);
    assert_eq!(rig::get(probes, "/ready").await.0, 200);
    let (_, metrics) = rig::get(probes, "/metrics").await;
    assert!(metrics.contains("\nshoal_rank_formations_total 1\n"));
    assert!(!metrics.contains("\nshoal_rank_steps_total 0\n"));

    rig.end().await.unwrap();
    in_time(async {
        while rig::get(probes, "/ready").await.0 != 503 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    stay.start();
    in_time(rank).await.unwrap().unwrap();
}

#[test]
fn a_machine_needs_memory_for_its_share() {
    let group = Group::new();
    let needed = |config: &WorkerConfig| match load::within(Some(1), config).err() {
        Some(LoadError::Backend(BackendError::OutOfMemory { needed, .. })) => needed,
        _ => panic!("a byte is not enough"),
    };
    let alone = WorkerConfig {
        tensor_parallel: None,
        ..group.worker()
    };
    assert_eq!(needed(&group.worker()), needed(&alone) / 2);
}

#[tokio::test]
async fn settings_of_a_rank_are_checked_before_it_leaves() {
    let group = Group::new();
    for rank in [0, 2] {
        let config = RankConfig {
            rank,
            ..group.rank()
        };
        let error = join_group(config, Shutdown::new()).await.unwrap_err();
        assert!(matches!(
            error,
            WorkerError::Config(ConfigError::Rank { world: 2, .. })
        ));
    }
    let config = RankConfig {
        secret: group.path("nowhere"),
        ..group.rank()
    };
    assert!(matches!(refused(config).await, GroupError::Secret(_)));
}
