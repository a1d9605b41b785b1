//! Every setting as flag, variable and key, and which of them wins.

#![allow(clippy::unwrap_used)]

mod support;

use support::{command, shoal};

/// A setting as `--help` shows it.
#[derive(Debug)]
struct Setting {
    /// Of `shoal`, that shows it.
    command: &'static str,
    section: &'static str,
    flag: String,
    variable: String,
}

impl Setting {
    fn key(&self) -> String {
        let name = self.variable.trim_start_matches("SHOAL_").to_lowercase();
        let section = format!("{}_", self.section);
        name.strip_prefix(&section).unwrap_or(&name).to_owned()
    }

    /// Three different values, as text and as TOML.
    fn values(&self) -> [String; 3] {
        let values = match self.key().as_str() {
            "listen" | "rank_listen" => ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"],
            "prefix_cache" => ["true", "false", "true"],
            "request_timeout" | "resume_window" | "worker_silence" | "worker_stall"
            | "itl_target" | "priority_aging" | "drain" | "drain_timeout" | "ttl"
            | "rank_timeout" | "corpus_ttl" => ["1s", "2s", "3s"],
            _ => ["1", "2", "3"],
        };
        values.map(str::to_owned)
    }

    fn toml(&self, value: &str) -> String {
        match self.key().as_str() {
            "workers" | "peers" => format!("['{value}']"),
            "prefix_cache" | "max_running" | "max_waiting" | "max_body_bytes"
            | "default_max_tokens" | "threads" | "context" | "step_rows" | "prefill_chunk"
            | "max_sessions" | "replicas" | "tensor_parallel" | "rank" | "corpus_users" => {
                value.to_owned()
            }
            _ => format!("'{value}'"),
        }
    }
}

/// The section's own settings: those whose variable bears its name.
async fn settings(command: &'static str, section: &'static str) -> Vec<Setting> {
    let help = shoal(&[command, "--help"], "").await.stdout;
    let mut found = Vec::new();
    let mut flag = None;
    for word in help
        .split_whitespace()
        .map(|word| word.trim_end_matches([']', ',', '=']))
    {
        if let Some(name) = word.strip_prefix("--") {
            let name = name.split(['=', '[']).next().unwrap();
            flag = Some(name.to_owned());
        } else if let Some(variable) = word.strip_prefix("SHOAL_") {
            let own = format!("{}_", section.to_uppercase());
            if variable.starts_with(&own) || (variable, section) == ("ISA", "worker") {
                found.push(Setting {
                    command,
                    section,
                    flag: flag.clone().unwrap(),
                    variable: format!("SHOAL_{variable}"),
                });
            }
        }
    }
    found
}

async fn printed(
    setting: &Setting,
    file: Option<&str>,
    variable: Option<&str>,
    flag: Option<&str>,
) -> toml::Value {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shoal.toml");
    let section = setting.section;
    let mut arguments = vec![setting.command.to_owned(), "--print-config".to_owned()];
    if let Some(value) = file {
        let text = format!("[{section}]\n{} = {}\n", setting.key(), setting.toml(value));
        std::fs::write(&path, text).unwrap();
        arguments.extend(["--config".to_owned(), path.display().to_string()]);
    }
    if let Some(value) = flag {
        arguments.push(format!("--{}={value}", setting.flag));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = command(&arguments);
    if let Some(value) = variable {
        command.env(&setting.variable, value);
    }
    let output = command.output().await.unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{setting:?}: {error}");
    let text = String::from_utf8(output.stdout).unwrap();
    let table: toml::Table = text.parse().unwrap();
    table[section]
        .get(setting.key())
        .cloned()
        .unwrap_or_else(|| panic!("{setting:?} is lost: {text}"))
}

#[tokio::test]
async fn every_setting_has_three_forms_and_the_nearest_wins() {
    for (command, section, least) in [
        ("up", "up", 4),
        ("router", "router", 16),
        ("worker", "worker", 30),
        ("router", "membership", 8),
        ("worker", "membership", 8),
    ] {
        let settings = settings(command, section).await;
        assert!(settings.len() >= least, "{section}: {settings:?}");
        for setting in &settings {
            let [in_file, in_variable, in_flag] = setting.values();
            let (f, v, g) = (
                Some(in_file.as_str()),
                Some(in_variable.as_str()),
                Some(in_flag.as_str()),
            );
            let from_file = printed(setting, f, None, None).await;
            let from_variable = printed(setting, None, v, None).await;
            let from_flag = printed(setting, None, None, g).await;
            assert_ne!(from_file, from_variable, "{setting:?}");
            assert_ne!(from_variable, from_flag, "{setting:?}");
            assert_eq!(
                printed(setting, f, v, None).await,
                from_variable,
                "{setting:?}"
            );
            assert_eq!(printed(setting, f, v, g).await, from_flag, "{setting:?}");
        }
    }
}

#[tokio::test]
async fn wrong_files_are_usage_errors_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shoal.toml");
    std::fs::write(&path, "[worker]\ntreads = 1\n").unwrap();
    let ran = shoal(&["worker", "--config", path.to_str().unwrap()], "").await;
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    assert!(
        ran.stderr.contains("worker.treads") && ran.stderr.contains("worker.threads"),
        "{ran:?}"
    );
}
