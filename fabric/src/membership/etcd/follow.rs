//! Lists keys and watches them: the reader's side.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use tokio::time::sleep;

use super::{
    Intent, Member, Shared, View, backoff,
    client::{Client, EtcdError, Range},
};
use crate::backoff::Backoff;

/// Keys and values, as last known.
pub(super) type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// Calls `publish` with the entries of the range, at first and after each change, for ever.
/// While etcd is away they stay as they were; after every loss, a compaction among them, they
/// are listed anew, so that nothing that happened meanwhile is missed.
pub(super) async fn follow(shared: Arc<Shared>, range: Range, mut publish: impl FnMut(&Entries)) {
    let mut entries = Entries::new();
    let mut backoff = backoff();
    loop {
        let end = once(&shared, &range, &mut entries, &mut publish, &mut backoff).await;
        let Err(error) = end;
        tracing::warn!(%error, "membership is as last known");
        sleep(backoff.pause()).await;
    }
}

async fn once(
    shared: &Shared,
    range: &Range,
    entries: &mut Entries,
    publish: &mut impl FnMut(&Entries),
    backoff: &mut Backoff,
) -> Result<Infallible, EtcdError> {
    let mut client = Client::connect(shared).await?;
    let (listed, revision) = client.list(range).await?;
    let mut changes = client.watch(range, revision + 1).await?;
    *entries = listed.into_iter().collect();
    publish(entries);
    backoff.reset();
    loop {
        for change in changes.next().await? {
            match change.value {
                Some(value) => entries.insert(change.key, value),
                None => entries.remove(&change.key),
            };
        }
        publish(entries);
    }
}

/// The members among the entries under `root`.
pub(super) fn view(entries: &Entries, root: &str) -> View {
    let mut view = View::default();
    for (key, value) in entries {
        let Some(path) = key.strip_prefix(root.as_bytes()) else {
            continue;
        };
        let list = if path.starts_with(b"instances/") {
            &mut view.workers
        } else if path.starts_with(b"routers/") {
            &mut view.routers
        } else {
            continue;
        };
        match serde_json::from_slice::<Member>(value) {
            Ok(member) => list.push(member),
            Err(error) => {
                let key = String::from_utf8_lossy(key);
                tracing::warn!(%key, %error, "a membership record cannot be read");
            }
        }
    }
    view
}

/// The intent that is the only entry; an unreadable one is none.
pub(super) fn intent(entries: &Entries) -> Option<Intent> {
    let value = entries.values().next()?;
    serde_json::from_slice(value)
        .inspect_err(|error| tracing::warn!(%error, "an intent cannot be read"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_holds_what_can_be_read() {
        let worker = r#"{"name":"g","role":"worker","address":"h:1","model":"m"}"#;
        let router = r#"{"name":"r","role":"router","address":"h:2"}"#;
        let entries: Entries = [
            ("/x/instances/m/g", worker),
            ("/x/instances/m/h", "{"),
            ("/x/intent/g", "{}"),
            ("/x/routers/r", router),
            ("/y/instances/m/g", worker),
        ]
        .into_iter()
        .map(|(key, value)| (key.into(), value.into()))
        .collect();
        let view = view(&entries, "/x/");
        assert_eq!((view.workers.len(), view.routers.len()), (1, 1));
        assert_eq!(view.workers[0].model, "m");
    }
}
