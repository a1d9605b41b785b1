//! Draft workers.

use serde_json::json;
use shoal_core::draft_anchor;

use crate::{
    mock::{Mock, Script, tokens},
    support::{Router, joined},
};

const ANSWER: &str = "Your parcel is on its way.";

async fn drafter() -> Mock {
    let script = Script {
        drafts: true,
        ..Script::answer(ANSWER)
    };
    Mock::gated(script).await
}

/// A router that has found the draft worker, too.
async fn ready(target: &Mock, drafter: &Mock) -> Router {
    let router = Router::ready(&[target, drafter]).await;
    let is_ready = format!("shoal_worker_ready{{worker=\"{}\"}}", drafter.address);
    router.metric_becomes(&is_ready, 1.0).await;
    router
}

#[tokio::test]
async fn a_draft_worker_runs_ahead_and_what_it_says_reaches_the_target() {
    let mut target = Mock::gated(Script::answer(ANSWER)).await;
    let mut drafter = drafter().await;
    let router = ready(&target, &drafter).await;
    let begin = async {
        let own = target.submitted().await;
        target.step(1);
        own
    };
    let (events, own) = tokio::join!(router.stream(json!({})), begin);
    let answer = tokio::spawn(events.rest());

    let lead = drafter.submitted().await;
    assert!(lead.lead.is_some() && lead.draft_rows == Some(0));
    assert_eq!((lead.seed, &lead.prompt), (own.seed, &own.prompt));
    let made = tokens(ANSWER);
    assert_eq!(lead.resume, made[..1]);
    drafter.step(2);
    let draft = loop {
        let draft = target.drafted().await;
        if draft.tokens.len() == 2 {
            break draft;
        }
    };
    assert_eq!(
        (draft.sequence, draft.base, &*draft.tokens),
        (own.sequence, 1, &made[1..3])
    );
    assert_eq!(
        draft.anchor,
        draft_anchor(&[&own.prompt, &made[..1]].concat())
    );

    target.step(1);
    let follow = drafter.followed().await;
    assert_eq!((follow.base, &*follow.tokens), (1, &made[1..2]));
    target.step(100);
    assert_eq!(joined(&answer.await.unwrap(), 0), ANSWER);
    assert_eq!(drafter.cancelled().await.sequence, lead.sequence);
    assert_eq!(drafter.untaken(), 0, "no request of its own");
}

#[tokio::test]
async fn the_death_of_a_draft_worker_changes_nothing() {
    let target = Mock::gated(Script::answer(ANSWER)).await;
    let mut drafter = drafter().await;
    let router = ready(&target, &drafter).await;
    let begin = async {
        target.live(1).await;
        target.step(1);
    };
    let (events, ()) = tokio::join!(router.stream(json!({})), begin);
    drafter.submitted().await;
    drop(drafter);
    target.step(100);
    assert_eq!(joined(&events.rest().await, 0), ANSWER);
}
