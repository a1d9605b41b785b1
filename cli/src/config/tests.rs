use std::path::Path;

use super::*;

fn parse(text: &str) -> Result<ConfigFile, ConfigError> {
    ConfigFile::parse(Path::new("shoal.toml"), text)
}

#[test]
fn unknown_keys_name_the_nearest() {
    for (text, key, nearest) in [
        (
            "[router]\nmax_runing = 1",
            "router.max_runing",
            "router.max_running",
        ),
        ("[worker]\nkv-size = 1", "worker.kv-size", "worker.kv_size"),
        ("[wroker]\nthreads = 1", "wroker", "worker"),
    ] {
        match parse(text) {
            Err(ConfigError::UnknownKey {
                key: k, nearest: n, ..
            }) => {
                assert_eq!((k.as_str(), n.as_str()), (key, nearest));
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn wrong_files_are_blamed_on_their_place() {
    let error = parse("[router]\n\nmax_running = = 1").unwrap_err();
    assert!(
        matches!(error, ConfigError::Syntax { line: 3, .. }),
        "{error:?}"
    );
    let error = parse("router = 1").unwrap_err();
    assert!(
        matches!(error, ConfigError::NotASection { .. }),
        "{error:?}"
    );
    let file = parse("[worker]\nname = 'a'\nthreads = 'many'").unwrap();
    let error = file.merge(&WorkerSettings::default()).unwrap_err();
    assert!(error.to_string().contains("worker.threads"), "{error}");
}

#[test]
fn what_is_given_wins_over_the_file() {
    let file = parse("[worker]\nname = 'file'\ncontext = 64").unwrap();
    let given = WorkerSettings {
        name: Some("given".to_owned()),
        ..WorkerSettings::default()
    };
    let merged = file.merge(&given).unwrap();
    assert_eq!(merged.name.as_deref(), Some("given"));
    assert_eq!(merged.context, Some(64));
    assert_eq!(merged.threads, None);
}

#[test]
fn half_of_a_tls_pair_is_refused() {
    let raw = RouterSettings {
        tls_cert: Some("cert.pem".into()),
        ..RouterSettings::default()
    };
    let error = shoal_router::RouterArgs::try_from(raw).unwrap_err();
    assert!(matches!(
        error,
        ConfigError::Incomplete {
            section: "router",
            ..
        }
    ));
}
