//! The listener and the channel over real sockets.

#![allow(clippy::unwrap_used)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, routing::get};
use shoal_fabric::{
    membership::Endpoint,
    net::{self, ClientConfig, Limits, ListenConfig, Network},
    tls::ServerTls,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, service::Routes, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

mod certificates;
use certificates::Certificates;

/// A served application: `/ping`, `/slow` until `release`, and grpc.health.v1.
struct Served {
    address: SocketAddr,
    entered: Arc<Notify>,
    release: Arc<Notify>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

async fn start(tls: Option<ServerTls>, limits: Limits) -> Served {
    let (entered, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (enter, wait) = (entered.clone(), release.clone());
    let slow = async move || {
        enter.notify_one();
        wait.notified().await;
        "slow"
    };
    let http = Router::new()
        .route("/ping", get(async || "pong"))
        .route("/slow", get(slow));
    let (_, health) = tonic_health::server::health_reporter();
    let app = net::one_port(http, Routes::new(health));
    let address = ([127, 0, 0, 1], 0).into();
    let config = ListenConfig {
        network: Network::Tcp,
        address,
        tls,
        limits,
    };
    let listener = net::bind(&config).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(net::serve(listener, app, stop.clone()));
    Served {
        address,
        entered,
        release,
        stop,
        task,
    }
}

impl Served {
    async fn send(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    fn endpoint(&self) -> Endpoint {
        self.address.to_string().parse().unwrap()
    }
}

fn get_request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
}

/// What comes until the server closes; a reset counts as a close.
async fn answer(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn check_health(channel: Channel) -> Result<(), tonic::Status> {
    let request = HealthCheckRequest::default();
    HealthClient::new(channel).check(request).await.map(drop)
}

#[tokio::test]
async fn one_port_speaks_http_and_grpc() {
    let served = start(None, Limits::default()).await;
    let response = answer(&mut served.send(&get_request("/ping")).await).await;
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(response.ends_with("pong"), "{response}");
    let response = answer(&mut served.send(&get_request("/nowhere")).await).await;
    assert!(response.starts_with("HTTP/1.1 404"), "{response}");

    let channel = net::channel(&served.endpoint(), &ClientConfig::default()).unwrap();
    check_health(channel.clone()).await.unwrap();
    let mut unknown = tonic::client::Grpc::new(channel);
    unknown.ready().await.unwrap();
    let codec = tonic_prost_codec();
    let path = http::uri::PathAndQuery::from_static("/no.Service/Method");
    let status = unknown
        .unary(
            tonic::Request::new(HealthCheckRequest::default()),
            path,
            codec,
        )
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

fn tonic_prost_codec()
-> tonic_prost::ProstCodec<HealthCheckRequest, tonic_health::pb::HealthCheckResponse> {
    tonic_prost::ProstCodec::default()
}

#[tokio::test]
async fn tls_serves_whom_it_trusts() {
    let files = Certificates::new();
    let server = files.server(None);
    let served = start(Some(server), Limits::default()).await;
    let call = async |tls| {
        let config = ClientConfig {
            tls: Some(tls),
            ..ClientConfig::default()
        };
        check_health(net::channel(&served.endpoint(), &config).unwrap()).await
    };
    call(files.client(None)).await.unwrap();
    let stranger = Certificates::new();
    assert!(call(stranger.client(None)).await.is_err());
    let plain = net::channel(&served.endpoint(), &ClientConfig::default()).unwrap();
    assert!(check_health(plain).await.is_err());
}

#[tokio::test]
async fn mutual_tls_wants_a_certificate_of_its_authority() {
    let (files, stranger) = (Certificates::new(), Certificates::new());
    let served = start(Some(files.server(Some(&files))), Limits::default()).await;
    let call = async |identity| {
        let config = ClientConfig {
            tls: Some(files.client(identity)),
            ..ClientConfig::default()
        };
        check_health(net::channel(&served.endpoint(), &config).unwrap()).await
    };
    call(Some(&files)).await.unwrap();
    assert!(call(None).await.is_err());
    assert!(call(Some(&stranger)).await.is_err());
}

#[tokio::test]
async fn silent_and_slow_clients_are_closed() {
    let limits = Limits {
        header_timeout: Duration::from_millis(50),
        ..Limits::default()
    };
    let served = start(None, limits).await;
    for start in [
        "",
        "PRI * HTTP/2.0\r\n",
        "GET /ping HTTP/1.1\r\nHost: a-slow-client\r\n",
    ] {
        let response = answer(&mut served.send(start).await).await;
        assert!(!response.contains("200"), "{start:?}: {response}");
    }
}

#[tokio::test]
async fn heads_have_a_limit() {
    let served = start(None, Limits::default()).await;
    let request = format!("GET /ping HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let response = answer(&mut served.send(&request).await).await;
    assert!(response.starts_with("HTTP/1.1 431"), "{response}");
}

#[tokio::test]
async fn connections_have_a_limit() {
    let limits = Limits {
        max_connections: 1,
        ..Limits::default()
    };
    let served = start(None, limits).await;
    let mut first = served.send(&get_request("/slow")).await;
    served.entered.notified().await;
    let mut second = TcpStream::connect(served.address).await.unwrap();
    assert_eq!(answer(&mut second).await, "");
    served.release.notify_one();
    assert!(answer(&mut first).await.ends_with("slow"));
}

#[tokio::test]
async fn open_requests_finish_at_the_end() {
    let served = start(None, Limits::default()).await;
    let mut open = served.send(&get_request("/slow")).await;
    served.entered.notified().await;
    served.stop.cancel();
    served.release.notify_one();
    assert!(answer(&mut open).await.ends_with("slow"));
    served.task.await.unwrap();
    assert!(TcpStream::connect(served.address).await.is_err());
}

#[tokio::test]
async fn the_end_has_a_bound() {
    let limits = Limits {
        drain: Duration::from_millis(50),
        ..Limits::default()
    };
    let served = start(None, limits).await;
    let mut open = served.send(&get_request("/slow")).await;
    served.entered.notified().await;
    served.stop.cancel();
    served.task.await.unwrap();
    assert_eq!(answer(&mut open).await, "");
}
