use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use shoal_core::{DraftScope, Subject, TokenId};

use super::*;
use crate::ledger::{LedgerConfig, MOST_ERASURES};
use crate::record::{Answer, Event, Owner, Whose};

const HOUR: Duration = Duration::from_secs(3600);
const USERS: [&str; 3] = ["a", "b", "c"];
const NAMES: [&str; 2] = ["faq", "terms"];

fn ledger(origin: u64) -> Ledger {
    let config = LedgerConfig {
        users: 2,
        ttl: HOUR,
        bytes: 4 << 20,
    };
    Ledger::new(config, origin)
}

fn owner() -> Owner {
    Owner {
        model: "m".into(),
        tenant: "acme".into(),
        scope: DraftScope::tenant("m", b"t", "acme", ""),
    }
}

fn whose(user: Option<&str>) -> Whose {
    let tenant = Subject::tenant("acme");
    let user = user.map(|user| tenant.user(user));
    Whose { tenant, user }
}

fn text(first: TokenId) -> Vec<TokenId> {
    (first..).take(20).collect()
}

fn learn(ledger: &mut Ledger, user: &str, tokens: &[TokenId]) {
    let owner = owner();
    let answer = Answer {
        scope: owner.scope.user(user),
        owner,
        whose: whose(Some(user)),
        tokens: tokens.into(),
        secrets: Vec::new(),
    };
    ledger.learn(answer, Instant::now());
}

fn load(ledger: &mut Ledger, name: &str, tokens: &[TokenId]) {
    let loaded = ledger.load(owner(), name.into(), tokens.into(), Instant::now());
    assert_eq!(loaded, Ok(()));
}

/// Everything that one tells another, `most` tokens at a time.
fn follow(from: &Ledger, to: &mut Ledger, most: usize) {
    let mut positions = to.positions();
    loop {
        let entries = from.exchange(&mut positions, true, most);
        if entries.is_empty() {
            to.advance(&positions);
            return;
        }
        to.take(entries, Instant::now());
    }
}

/// What a router knows, without what it told its own workers.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    answers: BTreeSet<(Stamp, DraftScope, Vec<TokenId>)>,
    public: Vec<(String, usize)>,
    /// What drafts for everybody, as a set of runs.
    shared: BTreeSet<Vec<TokenId>>,
}

fn known(ledger: &Ledger) -> Known {
    let logs = || std::iter::once(&ledger.own).chain(ledger.others.values());
    let answers = logs()
        .flat_map(Log::iter)
        .filter(|record| record.is_answer());
    let shared = ledger.own.iter().filter_map(|record| match &record.event {
        Event::Shared(tokens) => Some(tokens.windows(8).map(<[u32]>::to_vec)),
        _ => None,
    });
    let listed = ledger.list("acme").into_iter();
    Known {
        answers: answers
            .map(|record| (record.stamp, record.scope, record.tokens().to_vec()))
            .collect(),
        public: listed.map(|text| (text.name, text.tokens)).collect(),
        shared: shared.flatten().collect(),
    }
}

#[test]
fn users_are_counted_over_all_routers() {
    let (mut one, mut two) = (ledger(1), ledger(2));
    learn(&mut one, "a", &text(100));
    learn(&mut two, "b", &text(100));
    assert!(known(&one).shared.is_empty() && known(&two).shared.is_empty());
    follow(&one, &mut two, 1000);
    follow(&two, &mut one, 1000);
    assert_eq!(known(&one), known(&two));
    assert_eq!(known(&one).shared.len(), 13);
}

#[test]
fn what_is_shared_late_is_as_old_as_its_answer() {
    let (mut one, mut two) = (ledger(1), ledger(2));
    learn(&mut one, "a", &text(100));
    learn(&mut two, "b", &text(100));
    let made = one.own.front().unwrap().made;
    let entries = one.exchange(&mut two.positions(), true, 1000);
    two.take(entries, made + HOUR / 2);
    let is_shared = |record: &&Arc<Record>| matches!(record.event, Event::Shared(_));
    assert_eq!(two.own.iter().find(is_shared).unwrap().made, made);
}

#[test]
fn a_restarted_router_gets_back_what_it_wrote() {
    let (mut one, mut two) = (ledger(1), ledger(2));
    learn(&mut one, "a", &text(100));
    load(&mut one, "faq", &text(500));
    follow(&one, &mut two, 1000);
    let mut again = ledger(3);
    again.set_live([2].into(), Instant::now());
    two.set_live([3].into(), Instant::now());
    follow(&two, &mut again, 1000);
    assert_eq!(known(&again), known(&one));
    // And tells the workers, now that nobody else does.
    let tokens = |ledger: &Ledger| {
        let entries = ledger.read(&mut Positions::new(), "m", 1000);
        entries
            .iter()
            .filter(|e| matches!(e, Entry::Text(_)))
            .count()
    };
    assert_eq!(
        (tokens(&two), tokens(&again)),
        (2, 0),
        "the first of the live ones tells"
    );
    again.set_live([].into(), Instant::now());
    assert_eq!(tokens(&again), 2);
    assert_eq!(again.orphans(), [1, 2]);
}

#[test]
fn routers_tell_workers_of_their_own_answers_only() {
    let (mut one, mut two) = (ledger(1), ledger(2));
    learn(&mut two, "b", &text(100));
    load(&mut two, "faq", &text(500));
    one.set_live([2].into(), Instant::now());
    follow(&two, &mut one, 1000);
    assert!(one.read(&mut Positions::new(), "m", 1000).is_empty());
    // But what void text is, everybody says.
    load(&mut two, "faq", &text(600));
    follow(&two, &mut one, 1000);
    assert_eq!(one.read(&mut Positions::new(), "m", 1000).len(), 2);
}

#[test]
fn a_late_answer_does_not_undo_an_erasure() {
    let (mut one, mut two, mut three) = (ledger(1), ledger(2), ledger(3));
    learn(&mut two, "a", &text(100));
    let id = one.erase(whose(Some("a")), Instant::now()).unwrap();
    follow(&one, &mut three, 1000);
    // Two has not heard: its answer comes late, to both.
    follow(&two, &mut one, 1000);
    follow(&two, &mut three, 1000);
    assert!(known(&one).answers.is_empty() && known(&three).answers.is_empty());
    one.set_live([2, 3].into(), Instant::now());
    assert!(!one.is_heard(id));
    follow(&three, &mut two, 1000);
    assert!(known(&two).answers.is_empty());
    follow(&two, &mut one, 1000);
    assert!(one.is_heard(id), "two says it for itself and for three");
    // What is answered from then on counts.
    learn(&mut two, "a", &text(200));
    follow(&two, &mut one, 1000);
    follow(&one, &mut three, 1000);
    assert_eq!(known(&three).answers.len(), 1);
    assert_eq!(known(&three), known(&one));
}

#[test]
fn a_follower_that_falls_behind_the_log_hears_of_erasures() {
    let (mut one, mut two) = (ledger(1), ledger(2));
    learn(&mut one, "a", &text(100));
    follow(&one, &mut two, 1000);
    one.erase(whose(Some("a")), Instant::now()).unwrap();
    load(&mut one, "faq", &text(500));
    // All that was there is pushed out.
    let long: Vec<TokenId> = (0..1 << 14).collect();
    for _ in 0..20 {
        learn(&mut one, "b", &long);
    }
    assert!(one.own.front().unwrap().stamp.offset > 2);
    follow(&one, &mut two, 1 << 20);
    let scope = owner().scope.user("a");
    assert!(known(&two).answers.iter().all(|(_, s, _)| *s != scope));
    assert_eq!(two.list("acme"), one.list("acme"));
}

#[test]
fn what_others_tell_is_bounded() {
    let mut one = ledger(1);
    let entry = |origin, offset, first| {
        let mut other = ledger(origin);
        learn(&mut other, "a", &text(first));
        let mut entries = other.exchange(&mut Positions::new(), false, 1000);
        if let Entry::Text(record) = &mut entries[0] {
            Arc::make_mut(record).stamp.offset = offset;
        }
        entries
    };
    for origin in 2..2000 {
        one.take(entry(origin, 7, origin as u32 * 50), Instant::now());
        assert!(one.others.len() <= MOST_LOGS);
    }
    let held: usize = one
        .others
        .values()
        .flat_map(Log::iter)
        .map(|r| r.tokens().len())
        .sum();
    assert_eq!(one.tokens, held);
    assert!(one.erasures.count(&Subject::tenant("acme")) < MOST_ERASURES);
}

/// What happens in a cluster of three routers.
#[derive(Clone, Debug)]
enum Act {
    Learn(usize, usize, u32),
    Erase(usize, Option<usize>),
    Load(usize, usize, u32),
    Drop(usize, usize),
    /// One follows another, and the link breaks after so many batches.
    Follow(usize, usize, usize),
    /// All that it knew is lost, and it starts as another.
    Restart(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let router = 0usize..3;
    prop_oneof![
        4 => (router.clone(), 0usize..3, 0u32..4).prop_map(|(r, u, t)| Act::Learn(r, u, t)),
        1 => (router.clone(), proptest::option::of(0usize..3)).prop_map(|(r, u)| Act::Erase(r, u)),
        1 => (router.clone(), 0usize..2, 1u32..4).prop_map(|(r, n, t)| Act::Load(r, n, t)),
        1 => (router.clone(), 0usize..2).prop_map(|(r, n)| Act::Drop(r, n)),
        6 => (router.clone(), router.clone(), 1usize..4).prop_map(|(r, s, n)| Act::Follow(r, s, n)),
        1 => router.prop_map(Act::Restart),
    ]
}

proptest! {
    /// Whatever was told when, twice, in part, or by whom: once all have told all, all know the
    /// same; and who was erased and not answered since is known to nobody.
    #[test]
    fn routers_converge_and_erasures_win(acts in proptest::collection::vec(act(), 1..80)) {
        let mut routers = [ledger(1), ledger(2), ledger(3)];
        let mut next_origin = 4;
        // By user: whether an answer was made at a router that knew of every erasure so far.
        let mut forgotten = [true; 3];
        for act in acts {
            match act {
                Act::Learn(router, user, first) => {
                    learn(&mut routers[router], USERS[user], &text(100 * first));
                    forgotten[user] = false;
                }
                Act::Erase(router, user) => {
                    let whose = whose(user.map(|user| USERS[user]));
                    routers[router].erase(whose, Instant::now()).unwrap();
                    let taken = |at: usize| user.is_none_or(|user| user == at);
                    (0..3).filter(|&at| taken(at)).for_each(|at| forgotten[at] = true);
                }
                Act::Load(router, name, tokens) => {
                    let tokens: Vec<TokenId> = (0..tokens * 10).collect();
                    load(&mut routers[router], NAMES[name], &tokens);
                }
                Act::Drop(router, name) => {
                    routers[router].unload("acme", NAMES[name], Instant::now());
                }
                Act::Follow(to, from, batches) => {
                    if to != from {
                        let mut positions = routers[to].positions();
                        for _ in 0..batches {
                            let entries = routers[from].exchange(&mut positions, true, 25);
                            routers[to].take(entries.clone(), Instant::now());
                            routers[to].take(entries, Instant::now());
                            routers[to].advance(&positions);
                        }
                    }
                }
                // Not before what it alone knows of erasures is known elsewhere: the API waits.
                Act::Restart(router) => {
                    for to in 0..3 {
                        if to != router {
                            let [one, other] = routers.get_disjoint_mut([router, to]).unwrap();
                            follow(one, other, 25);
                        }
                    }
                    routers[router] = ledger(next_origin);
                    next_origin += 1;
                }
            }
        }
        for _ in 0..3 {
            for to in 0..3 {
                for from in (0..3).filter(|&from| from != to) {
                    let [from, to] = routers.get_disjoint_mut([from, to]).unwrap();
                    follow(from, to, 25);
                }
            }
        }
        let [one, two, three] = routers.each_ref().map(known);
        prop_assert_eq!(&one.answers, &two.answers);
        prop_assert_eq!(&one.answers, &three.answers);
        prop_assert_eq!(&one.public, &two.public);
        prop_assert_eq!(&one.public, &three.public);
        prop_assert_eq!(&one.shared, &two.shared);
        prop_assert_eq!(&one.shared, &three.shared);
        for (user, forgotten) in USERS.iter().zip(forgotten) {
            let scope = owner().scope.user(user);
            let is_there = one.answers.iter().any(|(_, known, _)| *known == scope);
            prop_assert!(!forgotten || !is_there, "{}", user);
        }
    }
}
