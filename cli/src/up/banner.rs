//! What a started cluster tells its user.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::UpConfig;

/// Prints the addresses and three lines to try.
pub(super) fn print(config: &UpConfig, address: SocketAddr, after: Duration) {
    let program = std::env::args()
        .next()
        .unwrap_or_else(|| "shoal".to_owned());
    let text = text(config, address, after, &program);
    let mut out = std::io::stdout().lock();
    // Nobody has to listen for the cluster to run.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn text(config: &UpConfig, address: SocketAddr, after: Duration, program: &str) -> String {
    let model = config.model.file_stem().unwrap_or_default().display();
    let seconds = after.as_secs_f64();
    let scheme = if config.tls { "https" } else { "http" };
    let url = format!("{scheme}://{}", reachable(address));
    let workers = match config.replicas {
        1 => "1 worker".to_owned(),
        n => format!("{n} workers"),
    };
    format!(
        r#"
Shoal is ready after {seconds:.2} s: {model}, {workers}

  OpenAI API  {url}/v1
  gRPC        {url}

Try:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"messages":[{{"role":"user","content":"Hello!"}}],"max_tokens":64}}'
  {program} chat --url {url}
  python3 -c "import openai; print(openai.OpenAI(base_url='{url}/v1', api_key='-').chat.completions.create(model='', messages=[{{'role': 'user', 'content': 'Hello!'}}], max_tokens=64).choices[0].message.content)"

Ctrl-C stops it.
"#
    )
}

/// An address of this machine for a listener on all of them.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_banner_names_addresses_that_work() {
        let config = UpConfig {
            replicas: 2,
            router_patience: Duration::ZERO,
            worker_patience: Duration::ZERO,
            router: Vec::new(),
            worker: Vec::new(),
            prefixed: true,
            model: "/models/tiny.gguf".into(),
            tls: false,
        };
        let address = "0.0.0.0:8080".parse().unwrap();
        let text = text(&config, address, Duration::from_millis(420), "shoal");
        assert!(text.contains("after 0.42 s: tiny, 2 workers"), "{text}");
        assert!(!text.contains("0.0.0.0"), "{text}");
        for try_line in [
            "curl http://127.0.0.1:8080/v1/",
            "shoal chat --url http://127.0.0.1:8080",
        ] {
            assert!(text.contains(try_line), "{text}");
        }
    }
}
