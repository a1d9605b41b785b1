//! Model files, good and bad.

use std::{fs, path::PathBuf, time::Duration};

use shoal_engine::{backend::BackendError, spec::SpecError};
use shoal_gguf::{
    GgmlType, GgufWriter,
    testmodel::{Family, TestModel},
};
use shoal_proto::worker::{Finish, RejectReason};
use tempfile::TempDir;

use super::rig::{self, Rig, in_time, submit};
use crate::{
    BackendKind, GroupConfig, GroupError, LoadError, Others, RankCommand, WorkerConfig,
    WorkerError,
    load::{self, Loaded},
};

/// The context of the small model.
const CONTEXT: usize = 512;

/// A file that is gone with the test.
struct File {
    _folder: TempDir,
    path: PathBuf,
}

impl File {
    fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("small.gguf");
        fs::write(&path, bytes).unwrap();
        Self {
            _folder: folder,
            path,
        }
    }

    fn config(&self) -> WorkerConfig {
        WorkerConfig {
            model: self.path.clone(),
            kv_bytes: Some(1 << 20),
            ..rig::config()
        }
    }

    fn error(&self) -> LoadError {
        load::model(&self.config()).err().expect("a bad file")
    }
}

fn small() -> Vec<u8> {
    let model = TestModel::tiny(Family::Llama, GgmlType::Q4_1);
    model.build().unwrap().to_bytes()
}

#[test]
fn every_backend_loads_a_model() {
    let file = File::new(&small());
    for kind in [BackendKind::Cpu, BackendKind::Candle] {
        let mut config = file.config();
        config.backend = kind;
        let Loaded {
            backend, tokenizer, ..
        } = load::model(&config).unwrap();
        assert_eq!(backend.name(), kind.to_string());
        assert_eq!(backend.spec().context, CONTEXT);
        assert_eq!(tokenizer.tokens.len(), backend.spec().vocab);
        assert!(backend.max_logit_rows() >= config.engine.max_running);
    }
}

#[test]
fn a_truncated_file_is_refused() {
    let whole = small();
    for len in [0, 3, 20, whole.len() / 2, whole.len() - 1] {
        let error = File::new(&whole[..len]).error();
        assert!(matches!(error, LoadError::File(_)), "{len}: {error}");
    }
    let error = File::new(&whole[..whole.len() - 1]).error().to_string();
    assert!(error.contains("the file ends"), "{error}");
}

#[test]
fn an_unknown_architecture_is_named() {
    let mut file = GgufWriter::new();
    file.metadata("general.architecture", "mamba").unwrap();
    let error = File::new(&file.to_bytes()).error();
    let unknown = matches!(
        &error,
        LoadError::Spec(SpecError::UnknownArchitecture(name)) if name == "mamba"
    );
    assert!(unknown, "{error}");
}

#[tokio::test]
async fn a_file_that_cannot_be_loaded_ends_the_worker_and_is_named() {
    let file = File::new(b"GGUF");
    let rig = Rig::running(file.config()).await;
    let error = in_time(rig.task).await.unwrap().unwrap_err();
    let message = format!("cannot load {}", file.path.display());
    assert_eq!(error.to_string(), message);
    assert!(matches!(error, WorkerError::Load { .. }));
}

#[test]
fn too_little_memory_is_told_before_it_is_taken() {
    let file = File::new(&small());
    let within = |available| load::within(Some(available), &file.config()).err();
    let Some(LoadError::Backend(BackendError::OutOfMemory { needed, .. })) = within(1000) else {
        panic!("1000 bytes are not enough");
    };
    assert!(
        needed > 1 << 20,
        "the KV pool alone is larger than {needed}"
    );
    assert!(within(needed).is_none());
    let error = within(needed - 1).expect("a byte is missing").to_string();
    let available = format!("{} are available", needed - 1);
    assert!(error.contains(&available), "{error}");
}

#[tokio::test]
async fn the_context_can_be_lowered_but_not_raised() {
    let file = File::new(&small());
    let context = |context| WorkerConfig {
        context: Some(context),
        ..file.config()
    };
    let Loaded { backend, .. } = load::model(&context(CONTEXT + 1)).unwrap();
    assert_eq!(backend.spec().context, CONTEXT);

    let rig = Rig::running(context(64)).await;
    assert_eq!(rig.description().await.context_length, 64);
    let mut session = rig.session().await;
    session.submit(submit(1, &[1; 65], 1)).await;
    assert_eq!(session.rejected().await.reason(), RejectReason::Invalid);
    session.submit(submit(2, &[1; 60], 100)).await;
    let (tokens, last) = session.answer(2).await;
    assert_eq!((tokens.len(), last.finish()), (4, Finish::Length));
}

fn group(file: &File, ranks: usize) -> WorkerConfig {
    let tensor_parallel = Some(GroupConfig {
        ranks,
        others: Others::Local(RankCommand {
            program: "false".into(),
            arguments: Vec::new(),
        }),
        patience: Duration::from_secs(1),
    });
    WorkerConfig {
        tensor_parallel,
        ..file.config()
    }
}

#[test]
fn a_group_whose_ranks_cannot_run_is_given_up() {
    let file = File::new(&small());
    let error = load::model(&group(&file, 2)).err().expect("no rank");
    let gone = matches!(
        error,
        LoadError::Group(GroupError::Died { rank: 1 } | GroupError::Start { rank: 1, .. })
    );
    assert!(gone, "{error}");
}

#[test]
fn a_split_that_cannot_be_is_refused() {
    let file = File::new(&small());
    let error = load::model(&group(&file, 5)).err().expect("four heads");
    let expected = "5 ranks cannot share the query heads: at most 4 can";
    assert_eq!(error.to_string(), expected);
}
