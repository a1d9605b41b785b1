//! Keepers with real processes: shell scripts that speak the control line on descriptor 0.

use std::path::PathBuf;
use std::time::Duration;

use shoal_fabric::membership::Member;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::child::Launch;
use super::keeper::{Event, KeepError, Keeper, Stop, What};

const READY: &str = r#"echo '{"listening":"127.0.0.1:1234"}' >&0; echo '"ready"' >&0;"#;
const UNTIL_DRAINED: &str = r#"while read -r order; do echo "$order" >> orders; case "$order" in *drain*) exit 0;; esac; done"#;

struct Kept {
    dir: TempDir,
    task: JoinHandle<Result<(), KeepError>>,
    events: mpsc::Receiver<Event>,
    workers: watch::Sender<Vec<Member>>,
    stop: Stop,
}

impl Kept {
    /// `script` runs in a directory of its own.
    fn start(script: &str, patience: Duration) -> Self {
        let dir = TempDir::new().unwrap();
        let script = format!("cd {}; {script}", dir.path().display());
        let (sender, events) = mpsc::channel(16);
        let (workers, members) = watch::channel(Vec::new());
        let stop = Stop {
            drain: CancellationToken::new(),
            kill: CancellationToken::new(),
            patience,
        };
        let keeper = Keeper {
            slot: 3,
            launch: Launch {
                name: "script".to_owned(),
                program: PathBuf::from("/bin/sh"),
                arguments: vec!["-c".to_owned(), script],
                prefixed: true,
            },
            events: sender,
            workers: Some(members),
            stop: stop.clone(),
        };
        Self {
            dir,
            task: tokio::spawn(keeper.run()),
            events,
            workers,
            stop,
        }
    }

    async fn event(&mut self) -> What {
        self.events.recv().await.unwrap().what
    }

    async fn end(&mut self) -> Result<(), KeepError> {
        (&mut self.task).await.unwrap()
    }

    async fn ready(&mut self) {
        let address = "127.0.0.1:1234".parse().unwrap();
        assert_eq!(self.event().await, What::Listening(address));
        assert_eq!(self.event().await, What::Ready);
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(file)).unwrap()
    }
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_crashed_process_starts_again_until_it_is_drained() {
    let script =
        format!("{READY} echo run >> runs; [ $(wc -l < runs) -gt 2 ] || exit 7; {UNTIL_DRAINED}");
    let mut kept = Kept::start(&script, LONG);
    for _ in 0..2 {
        kept.ready().await;
        assert_eq!(kept.event().await, What::Gone);
    }
    kept.ready().await;
    kept.stop.drain.cancel();
    kept.end().await.unwrap();
    assert!(
        kept.events.recv().await.is_none(),
        "a drained process stays down"
    );
}

#[tokio::test]
async fn a_process_that_cannot_start_is_an_error_with_its_reason() {
    let script = r#"echo '{"failed":"the port is taken"}' >&0; exit 1"#;
    let mut kept = Kept::start(script, LONG);
    let error = kept.end().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "script failed to start: the port is taken"
    );

    let mut kept = Kept::start("exit 3", LONG);
    let error = kept.end().await.unwrap_err();
    assert!(error.to_string().contains("exit status: 3"), "{error}");
}

#[tokio::test]
async fn a_failed_restart_is_tried_again() {
    let script = format!(
        "echo run >> runs; [ $(wc -l < runs) -ne 2 ] || exit 1; {READY} [ $(wc -l < runs) -gt 1 ] || exit 1; {UNTIL_DRAINED}"
    );
    let mut kept = Kept::start(&script, LONG);
    kept.ready().await;
    assert_eq!(kept.event().await, What::Gone);
    assert_eq!(
        kept.event().await,
        What::Gone,
        "the second process never gets ready"
    );
    kept.ready().await;
    kept.stop.drain.cancel();
    kept.end().await.unwrap();
}

#[tokio::test]
async fn every_process_is_told_of_the_workers() {
    let script = format!(
        "{READY} [ -e first ] || {{ touch first; read -r order; echo \"$order\" > before; exit 1; }}; {UNTIL_DRAINED}"
    );
    let mut kept = Kept::start(&script, LONG);
    let member = Member::at("127.0.0.1:9".parse().unwrap());
    kept.workers.send_replace(vec![member]);
    kept.ready().await;
    assert_eq!(kept.event().await, What::Gone);
    kept.ready().await;
    kept.stop.drain.cancel();
    kept.end().await.unwrap();
    let orders = kept.read("orders");
    let mut orders = orders.lines();
    let told = orders.next().unwrap();
    assert!(told.contains(r#""address":"127.0.0.1:9""#), "{told}");
    assert_eq!(orders.next(), Some(r#""drain""#));
    assert!(kept.read("before").contains("workers"));
}

#[tokio::test]
async fn a_process_that_will_not_end_is_killed() {
    let mut kept = Kept::start(
        &format!("{READY} exec sleep 1000"),
        Duration::from_millis(50),
    );
    kept.ready().await;
    kept.stop.drain.cancel();
    kept.end().await.unwrap();

    let mut kept = Kept::start(&format!("{READY} exec sleep 1000"), LONG);
    kept.ready().await;
    kept.stop.drain.cancel();
    kept.stop.kill.cancel();
    kept.end().await.unwrap();
}
