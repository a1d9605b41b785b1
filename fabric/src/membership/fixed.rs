use std::sync::Arc;

use tokio::sync::watch;

use super::{Endpoint, Member, Membership, View};

/// A list from the configuration; it never changes.
#[derive(Clone, Debug)]
pub struct Static(watch::Receiver<Arc<View>>);

impl Static {
    /// These workers, duplicates left out.
    pub fn new(endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        let mut view = View::default();
        for endpoint in endpoints {
            let member = Member::at(endpoint);
            if !view.workers.contains(&member) {
                view.workers.push(member);
            }
        }
        Self(watch::channel(Arc::new(view)).1)
    }
}

impl Membership for Static {
    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.0.clone()
    }
}

/// The workers of one supervisor, which tells of each change.
#[derive(Clone, Debug, Default)]
pub struct Local(watch::Sender<Arc<View>>);

impl Local {
    /// These are the workers from now on.
    pub fn set(&self, workers: Vec<Member>) {
        let view = View {
            workers,
            routers: Vec::new(),
        };
        self.0.send_replace(Arc::new(view));
    }
}

impl Membership for Local {
    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_list_has_no_duplicates() {
        let list = ["a:1", "b:1", "a:1"].map(|e| e.parse().unwrap());
        let view = Static::new(list).watch().borrow().clone();
        let names: Vec<&str> = view.workers.iter().map(|m| &*m.name).collect();
        assert_eq!(names, ["a:1", "b:1"]);
    }

    #[test]
    fn a_supervisor_s_word_is_the_view() {
        let local = Local::default();
        let mut view = local.watch();
        assert!(view.borrow().workers.is_empty());
        local.set(vec![Member::at("a:1".parse().unwrap())]);
        assert!(view.has_changed().unwrap());
        assert_eq!(view.borrow_and_update().workers[0].name, "a:1");
    }
}
