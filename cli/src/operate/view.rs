//! A cluster's status as text for people, and as JSON for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};
use shoal_proto::admin::{GetStatusResponse, Group, Load, Router, State};

use super::table::{Align, Table};

/// Cells of the bar that shows how full a KV pool is.
const BAR: usize = 10;

const GREEN: &str = "32";
const YELLOW: &str = "33";
const RED: &str = "31";

/// One line for the router that answered, one block for each model.
pub(super) fn text(status: &GetStatusResponse, colour: bool) -> String {
    let mut text = String::new();
    let router = status.router.clone().unwrap_or_default();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{} router {}  {}  {} running, {} waiting",
        dot(router.state(), colour),
        named(&router.name, &router.address),
        word(router.state()),
        status.running,
        status.waiting,
    );
    for other in &status.routers {
        if other.name != router.name {
            let (dot, name) = (
                dot(other.state(), colour),
                named(&other.name, &other.address),
            );
            let _ = writeln!(text, "{dot} router {name}  {}", word(other.state()));
        }
    }
    if status.groups.is_empty() {
        text.push_str("\nno worker is known\n");
    }
    for groups in status.groups.chunk_by(|a, b| a.model == b.model) {
        text.push('\n');
        model(&mut text, groups, colour);
    }
    text
}

fn model(text: &mut String, groups: &[Group], colour: bool) {
    let first = &groups[0];
    let name = match first.model.as_str() {
        "" => "unknown model",
        name => name,
    };
    let ready = groups.iter().filter(|group| is_ready(group)).count();
    let all = groups.len();
    let _ = write!(text, "{name}");
    if !first.quantization.is_empty() {
        let _ = write!(text, "  {}", first.quantization);
    }
    let _ = writeln!(text, "  {ready} of {all} groups ready");
    let (left, right) = (Align::Left, Align::Right);
    let mut table = Table::new([
        ("GROUP", left),
        ("ADDRESS", left),
        ("STATE", left),
        ("RANKS", right),
        ("PLACED", right),
        ("RUNNING", right),
        ("WAITING", right),
        ("KV", left),
        ("TOK/S", right),
        ("STEP P50/P99", right),
        ("EPOCH", right),
    ]);
    for group in groups {
        table.push(row(group));
    }
    let mut dots = vec![" ".to_owned()];
    dots.extend(groups.iter().map(|group| dot(seen(group), colour)));
    for (dot, line) in dots.iter().zip(table.lines()) {
        let _ = writeln!(text, "{dot} {line}");
    }
}

fn row(group: &Group) -> [String; 11] {
    let load = group.load.unwrap_or_default();
    let known = group.connected;
    let or_blank = |known: bool, cell: String| if known { cell } else { "-".to_owned() };
    [
        group.name.clone(),
        group.address.clone(),
        condition(group).to_owned(),
        or_blank(group.tensor_parallel > 0, group.tensor_parallel.to_string()),
        or_blank(known, group.placed.to_string()),
        or_blank(known, load.running.to_string()),
        or_blank(known, load.waiting.to_string()),
        or_blank(known, bar(load.kv_usage)),
        or_blank(load.decode_tps > 0.0, format!("{:.0}", load.decode_tps)),
        or_blank(
            load.step_ms_p99 > 0.0,
            format!("{:.1}/{:.1} ms", load.step_ms_p50, load.step_ms_p99),
        ),
        or_blank(group.epoch > 0, group.epoch.to_string()),
    ]
}

fn named(name: &str, address: &str) -> String {
    match name == address {
        true => name.to_owned(),
        false => format!("{name} ({address})"),
    }
}

fn is_ready(group: &Group) -> bool {
    group.connected && group.state() == State::Ready
}

/// The state that counts: without a session, a ready worker is of no use here.
fn seen(group: &Group) -> State {
    match group.state() {
        State::Ready if !group.connected => State::Unspecified,
        state => state,
    }
}

fn condition(group: &Group) -> &'static str {
    match (seen(group), group.retired) {
        (_, true) => "retired",
        (State::Unspecified, _) => "unreachable",
        (State::Ready, _) if group.breaker_open => "failing",
        (state, _) => word(state),
    }
}

fn word(state: State) -> &'static str {
    match state {
        State::Unspecified => "unknown",
        State::Starting => "starting",
        State::Ready => "ready",
        State::Draining => "draining",
    }
}

fn dot(state: State, colour: bool) -> String {
    let code = match state {
        State::Ready => GREEN,
        State::Starting | State::Draining => YELLOW,
        State::Unspecified => RED,
    };
    match colour {
        true => format!("\x1b[{code}m●\x1b[0m"),
        false => "●".to_owned(),
    }
}

fn bar(share: f64) -> String {
    let share = share.clamp(0.0, 1.0);
    let full = (share * BAR as f64).round() as usize;
    let (full, empty) = ("█".repeat(full), "░".repeat(BAR - full));
    format!("{full}{empty} {:>3.0} %", share * 100.0)
}

/// The whole status.
pub(super) fn json(status: &GetStatusResponse) -> Value {
    let router = |router: &Router| {
        json!({
            "name": router.name,
            "address": router.address,
            "state": word(router.state()),
        })
    };
    let group = |group: &Group| {
        json!({
            "name": group.name,
            "address": group.address,
            "model": group.model,
            "state": word(group.state()),
            "connected": group.connected,
            "retired": group.retired,
            "breaker_open": group.breaker_open,
            "epoch": group.epoch,
            "numerics_id": group.numerics_id,
            "backend": group.backend,
            "quantization": group.quantization,
            "tensor_parallel": group.tensor_parallel,
            "context_length": group.context_length,
            "pages": group.pages,
            "placed": group.placed,
            "load": group.load.as_ref().map(load),
        })
    };
    json!({
        "router": status.router.as_ref().map(router),
        "routers": status.routers.iter().map(router).collect::<Vec<_>>(),
        "groups": status.groups.iter().map(group).collect::<Vec<_>>(),
        "running": status.running,
        "waiting": status.waiting,
    })
}

fn load(load: &Load) -> Value {
    json!({
        "running": load.running,
        "waiting": load.waiting,
        "kv_usage": load.kv_usage,
        "prefill_tps": load.prefill_tps,
        "decode_tps": load.decode_tps,
        "step_ms_p50": load.step_ms_p50,
        "step_ms_p99": load.step_ms_p99,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> GetStatusResponse {
        let mut router = Router {
            name: "a".into(),
            address: "10.0.0.1:8080".into(),
            ..Router::default()
        };
        router.set_state(State::Ready);
        let mut ready = Group {
            name: "blue-0".into(),
            address: "10.0.0.2:9090".into(),
            model: "small".into(),
            quantization: "Q4_1".into(),
            connected: true,
            epoch: 7,
            tensor_parallel: 2,
            placed: 3,
            load: Some(Load {
                running: 3,
                kv_usage: 0.34,
                decode_tps: 312.4,
                step_ms_p50: 4.0,
                step_ms_p99: 9.04,
                ..Load::default()
            }),
            ..Group::default()
        };
        ready.set_state(State::Ready);
        let lost = Group {
            name: "blue-1".into(),
            connected: false,
            load: None,
            ..ready.clone()
        };
        GetStatusResponse {
            router: Some(router.clone()),
            routers: vec![router],
            groups: vec![ready, lost],
            running: 3,
            waiting: 1,
        }
    }

    #[test]
    fn people_see_every_group_under_its_model() {
        let mut failing = status();
        failing.groups[0].breaker_open = true;
        assert!(super::text(&failing, false).contains("failing"));
        let text = text(&status(), false);
        let expected = "\
● router a (10.0.0.1:8080)  ready  3 running, 1 waiting

small  Q4_1  1 of 2 groups ready
  GROUP   ADDRESS        STATE        RANKS  PLACED  RUNNING  WAITING  KV                TOK/S  STEP P50/P99  EPOCH
● blue-0  10.0.0.2:9090  ready            2       3        3        0  ███░░░░░░░  34 %    312    4.0/9.0 ms      7
● blue-1  10.0.0.2:9090  unreachable      2       -        -        -  -                     -             -      7
";
        assert_eq!(text, expected);
        assert!(super::text(&status(), true).contains("\x1b[32m●"));
        assert!(super::text(&GetStatusResponse::default(), false).contains("no worker"));
    }

    #[test]
    fn programs_see_the_same() {
        let value = json(&status());
        assert_eq!(value["groups"][0]["load"]["running"], 3);
        assert_eq!(value["groups"][1]["load"], Value::Null);
        assert_eq!(value["router"]["state"], "ready");
    }
}
