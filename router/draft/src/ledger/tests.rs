use super::*;
use crate::erasures::ON_THEIR_WAY;
use crate::store::Store;

const HOUR: Duration = Duration::from_secs(3600);

fn config(users: usize) -> LedgerConfig {
    LedgerConfig {
        users,
        ttl: HOUR,
        bytes: 1 << 20,
    }
}

fn owner(tenant: &str) -> Owner {
    Owner {
        model: "m".into(),
        tenant: tenant.into(),
        scope: DraftScope::tenant("m", b"t", tenant, ""),
    }
}

fn text(first: TokenId, tokens: usize) -> Vec<TokenId> {
    (first..).take(tokens).collect()
}

fn whose(tenant: &str, user: Option<&str>) -> Whose {
    let tenant = Subject::tenant(tenant);
    let user = user.map(|user| tenant.user(user));
    Whose { tenant, user }
}

fn answer(tenant: &str, user: &str, tokens: &[TokenId]) -> Answer {
    let owner = owner(tenant);
    Answer {
        scope: owner.scope.user(user),
        owner,
        whose: whose(tenant, Some(user)),
        tokens: tokens.into(),
        secrets: Vec::new(),
    }
}

fn learn(ledger: &mut Ledger, tenant: &str, user: &str, tokens: &[TokenId]) {
    ledger.learn(answer(tenant, user, tokens), Instant::now());
}

fn load(ledger: &mut Ledger, name: &str, tokens: Vec<TokenId>) -> Result<(), PublicFull> {
    ledger.load(owner("acme"), name.into(), tokens.into(), Instant::now())
}

fn erase(ledger: &mut Ledger, user: Option<&str>) {
    ledger.erase(whose("acme", user), Instant::now()).unwrap();
}

/// Every entry for the workers of a model.
fn told(ledger: &Ledger, model: &str) -> Vec<Entry> {
    let (mut positions, mut told) = (Positions::new(), Vec::new());
    loop {
        let entries = ledger.read(&mut positions, model, 1000);
        if entries.is_empty() {
            assert_eq!(positions[&ledger.origin()], ledger.next());
            return told;
        }
        told.extend(entries);
    }
}

/// A worker that has followed the whole log.
fn worker(ledger: &Ledger) -> Store {
    let store = Store::new(64 << 20, HOUR);
    for entry in told(ledger, "m") {
        match entry {
            Entry::Text(record) if record.event == Event::Cleared => store.clear(&record.scope),
            Entry::Text(record) => {
                store.add(record.scope, record.whose, record.tokens(), Duration::ZERO);
            }
            Entry::Erased(erased) => store.erase(&erased.whose),
            Entry::Public(_) => panic!("workers are told of public texts as of others"),
        }
    }
    store
}

/// How many of `tokens` are drafted after the first eight, for a user of a tenant.
fn drafted(store: &Store, tenant: &str, user: &str, tokens: &[TokenId]) -> usize {
    let scope = owner(tenant).scope;
    let scopes = [scope.user(user), scope, scope.public()];
    let right = |scope: &DraftScope| {
        let corpus = store.get(scope)?;
        let corpus = corpus.read().unwrap();
        let found = corpus.longest(&tokens[..8])?;
        let guesses = corpus.read(found.next, 32);
        Some(
            guesses
                .zip(&tokens[8..])
                .take_while(|(a, b)| a == *b)
                .count(),
        )
    };
    scopes.iter().filter_map(right).max().unwrap_or(0)
}

#[test]
fn an_answer_drafts_for_its_user_and_for_others_once_enough_had_it() {
    let mut ledger = Ledger::new(config(3), 1);
    let answer = text(100, 30);
    for (user, others) in [("a", 0), ("b", 0), ("c", 22)] {
        learn(&mut ledger, "acme", user, &answer);
        // Again and again: that is one user all the same.
        learn(&mut ledger, "acme", user, &answer);
        let store = worker(&ledger);
        assert_eq!(drafted(&store, "acme", user, &answer), 22);
        assert_eq!(drafted(&store, "acme", "nobody", &answer), others);
        assert_eq!(drafted(&store, "other", user, &answer), 0);
    }
    // What is shared already is not told again.
    let before = ledger.tokens;
    learn(&mut ledger, "acme", "d", &answer);
    assert_eq!(ledger.tokens, before + answer.len());
}

#[test]
fn only_what_is_common_is_shared() {
    let mut ledger = Ledger::new(config(2), 1);
    let common = text(100, 20);
    for (user, own) in [("a", 1000), ("b", 2000)] {
        let answer = [text(own, 10), common.clone(), text(own + 50, 10)].concat();
        learn(&mut ledger, "acme", user, &answer);
    }
    let store = worker(&ledger);
    assert_eq!(drafted(&store, "acme", "c", &common), 12);
    let after = [common, text(1050, 5)].concat();
    assert_eq!(drafted(&store, "acme", "c", &after), 12);
    assert_eq!(drafted(&store, "acme", "c", &text(1000, 10)), 0);
}

#[test]
fn secrets_are_never_shared() {
    let mut ledger = Ledger::new(config(1), 1);
    let answer = Answer {
        secrets: vec![20..22, 40..41],
        ..answer("acme", "a", &text(100, 60))
    };
    ledger.learn(answer, Instant::now());
    let store = worker(&ledger);
    for (first, right) in [(100, 12), (105, 7), (115, 0), (122, 10), (141, 11)] {
        assert_eq!(
            drafted(&store, "acme", "b", &text(first, 30)),
            right,
            "{first}"
        );
    }
}

#[test]
fn erased_users_leave_nothing_behind() {
    let mut ledger = Ledger::new(config(2), 1);
    let (both, all) = (text(100, 20), text(500, 20));
    for user in ["a", "b"] {
        learn(&mut ledger, "acme", user, &both);
    }
    for user in ["a", "b", "c"] {
        learn(&mut ledger, "acme", user, &all);
    }
    assert_eq!(load(&mut ledger, "faq", text(900, 20)), Ok(()));
    erase(&mut ledger, Some("a"));
    let store = worker(&ledger);
    assert_eq!(drafted(&store, "acme", "a", &both), 0);
    assert_eq!(drafted(&store, "acme", "b", &both), 12);
    assert_eq!(drafted(&store, "acme", "x", &both), 0);
    assert_eq!(
        drafted(&store, "acme", "x", &all),
        12,
        "b and c still share it"
    );
    assert_eq!(drafted(&store, "acme", "x", &text(900, 20)), 12);

    erase(&mut ledger, None);
    let store = worker(&ledger);
    for user in ["a", "b", "c", "x"] {
        assert_eq!(drafted(&store, "acme", user, &all), 0);
    }
    assert_eq!(
        drafted(&store, "acme", "x", &text(900, 20)),
        12,
        "public text stays"
    );
}

/// When the texts were made that are shared.
fn shared(ledger: &Ledger) -> Vec<Instant> {
    let entries = told(ledger, "m").into_iter();
    let shared = entries.filter_map(|entry| match entry {
        Entry::Text(record) => matches!(record.event, Event::Shared(_)).then_some(record.made),
        _ => None,
    });
    shared.collect()
}

#[test]
fn an_erasure_does_not_renew_what_the_others_share() {
    let mut ledger = Ledger::new(config(2), 1);
    let start = Instant::now();
    let minutes = |n: u32| start + n * HOUR / 60;
    for (user, at) in [("a", 0), ("b", 1), ("c", 2)] {
        ledger.learn(answer("acme", user, &text(100, 30)), minutes(at));
    }
    assert_eq!(shared(&ledger), [minutes(1)]);
    let erased = ledger.erase(whose("acme", Some("a")), minutes(59));
    assert!(erased.is_ok());
    assert_eq!(shared(&ledger), [minutes(2)]);
    ledger.trim(minutes(63));
    assert!(ledger.shared.is_empty() && shared(&ledger).is_empty());
}

#[test]
fn public_text_that_is_lost_behind_an_older_one_is_told_again() {
    let mut ledger = small(4000);
    let start = Instant::now();
    let minutes = |n: u32| start + n * HOUR / 60;
    for user in ["a", "b", "c", "d"] {
        ledger.learn(answer("acme", user, &text(100, 30)), start);
    }
    let faq = text(900, 20).into();
    let loaded = ledger.load(owner("acme"), "faq".into(), faq, minutes(10));
    assert_eq!(loaded, Ok(()));
    assert!(ledger.erase(whose("acme", Some("a")), minutes(20)).is_ok());
    let is_shared = |record: &Record| matches!(record.event, Event::Shared(_));
    let mut answers = (10_000..).step_by(100).map(|first| text(first, 10));
    while !ledger.own.front().is_some_and(|record| is_shared(record)) {
        let tokens = answers.next().unwrap();
        ledger.learn(answer("acme", "x", &tokens), minutes(30));
    }
    assert_eq!(drafted(&worker(&ledger), "acme", "x", &text(900, 20)), 0);
    ledger.retell_public(minutes(31));
    assert_eq!(drafted(&worker(&ledger), "acme", "x", &text(900, 20)), 12);
}

#[test]
fn public_text_is_loaded_replaced_listed_and_dropped() {
    let config = LedgerConfig {
        bytes: 4 << 20,
        ..config(3)
    };
    let mut ledger = Ledger::new(config, 1);
    let now = Instant::now();
    for (name, text) in [
        ("faq", text(100, 20_000)),
        ("terms", text(50_000, 50)),
        ("faq", text(30_000, 60)),
    ] {
        assert_eq!(load(&mut ledger, name, text), Ok(()));
    }
    let listed = ledger.list("acme");
    let names: Vec<_> = listed.iter().map(|l| (l.name.as_str(), l.tokens)).collect();
    assert_eq!(names, [("faq", 60), ("terms", 50)]);
    assert!(ledger.list("other").is_empty());
    let store = worker(&ledger);
    assert_eq!(drafted(&store, "acme", "x", &text(100, 40)), 0);
    assert_eq!(drafted(&store, "acme", "x", &text(30_000, 30)), 22);
    assert_eq!(drafted(&store, "other", "x", &text(30_000, 30)), 0);
    assert!(!ledger.unload("other", "faq", now));
    assert!(ledger.unload("acme", "faq", now));
    let store = worker(&ledger);
    assert_eq!(drafted(&store, "acme", "x", &text(30_000, 30)), 0);
    assert_eq!(drafted(&store, "acme", "x", &text(50_000, 30)), 22);
}

/// Books whose log holds so many tokens.
fn small(tokens: usize) -> Ledger {
    let config = LedgerConfig {
        bytes: 32 * tokens,
        ..config(3)
    };
    Ledger::new(config, 1)
}

#[test]
fn the_log_is_bounded_and_public_text_outlives_it() {
    let mut ledger = small(4000);
    assert_eq!(load(&mut ledger, "faq", text(900, 20)), Ok(()));
    for answer in 0..500 {
        learn(&mut ledger, "acme", "a", &text(answer * 100, 50));
        assert!(ledger.tokens <= 4000);
    }
    ledger.retell_public(Instant::now());
    let store = worker(&ledger);
    assert_eq!(drafted(&store, "acme", "x", &text(900, 20)), 12);
    assert!(told(&ledger, "another model").is_empty());

    ledger.trim(Instant::now() + HOUR);
    let public = owner("acme").scope.public();
    let is_public = |entry: &Entry| match entry {
        Entry::Text(record) => record.scope == public,
        _ => false,
    };
    assert!(told(&ledger, "m").iter().all(is_public));
}

#[test]
fn public_text_leaves_room_for_answers_and_for_other_tenants() {
    let mut ledger = small(8000);
    let (of, most) = ("a tenant", 2000);
    assert_eq!(load(&mut ledger, "faq", text(0, 1500)), Ok(()));
    let full = Err(PublicFull {
        of,
        held: 1500,
        most,
    });
    assert_eq!(load(&mut ledger, "terms", text(0, 501)), full);
    assert_eq!(load(&mut ledger, "terms", text(0, 500)), Ok(()));
    // What is refused replaces nothing; what is replaced does not count.
    let full = Err(PublicFull {
        of,
        held: 500,
        most,
    });
    assert_eq!(load(&mut ledger, "faq", text(0, 1501)), full);
    for _ in 0..10 {
        assert_eq!(load(&mut ledger, "faq", text(0, 1499)), Ok(()));
    }
    assert!(ledger.tokens <= 8000);
    let listed: Vec<_> = ledger.list("acme").iter().map(|text| text.tokens).collect();
    assert_eq!(listed, [1499, 500]);
    let mut load = |tenant: &str, tokens| {
        let now = Instant::now();
        ledger.load(owner(tenant), "faq".into(), text(0, tokens).into(), now)
    };
    assert_eq!(load("b", 2000), Ok(()));
    let full = PublicFull {
        of: "a cluster",
        held: 3999,
        most: 4000,
    };
    assert_eq!(load("c", 2), Err(full));
}

#[test]
fn erasures_are_bounded_and_outlive_the_log() {
    let mut ledger = small(4000);
    learn(&mut ledger, "acme", "0", &text(0, 50));
    for user in 0..MOST_ERASURES {
        erase(&mut ledger, Some(&user.to_string()));
    }
    let full = ledger.erase(whose("acme", Some("one more")), Instant::now());
    assert_eq!(full, Err(ErasuresFull));
    assert!(ledger.erase(whose("acme", None), Instant::now()).is_ok());
    // No answer pushes one out, and a worker that was away hears of all.
    for answer in 0..200 {
        learn(&mut ledger, "acme", "a", &text(answer * 100, 50));
    }
    let erased = |entry: &Entry| matches!(entry, Entry::Erased(_));
    let told = told(&ledger, "m");
    assert_eq!(
        told.iter().filter(|entry| erased(entry)).count(),
        MOST_ERASURES + 1
    );
    ledger.trim(Instant::now() + HOUR);
    assert!(
        ledger
            .erase(whose("acme", Some("a")), Instant::now())
            .is_err()
    );
    ledger.trim(Instant::now() + HOUR + ON_THEIR_WAY + Duration::from_secs(1));
    assert!(
        ledger
            .erase(whose("acme", Some("a")), Instant::now())
            .is_ok()
    );
}

/// The probability that a member's score is above a stranger's, ties by half.
fn auc(members: &[usize], strangers: &[usize]) -> f64 {
    let wins: f64 = members
        .iter()
        .flat_map(|m| strangers.iter().map(move |s| m.cmp(s)))
        .map(|order| f64::from(order as i8 + 1) / 2.0)
        .sum();
    wins / (members.len() * strangers.len()) as f64
}

/// An attacker who knows the beginning of a private text asks whether it drafts: of a tenant's
/// own users `holders` were answered with it, or none was. Every score has the noise of shared
/// templates under it.
fn probe(users: usize, holders: usize, attacker: &str) -> (f64, f64) {
    const TRIALS: u32 = 1000;
    let mut scores = [Vec::new(), Vec::new()];
    for trial in 0..TRIALS {
        let mut ledger = Ledger::new(config(users), 1);
        let template = text(10_000, 12 + trial as usize % 9);
        let secret = [template.clone(), text(20_000 + trial * 100, 20)].concat();
        for user in 0..users {
            learn(&mut ledger, "acme", &format!("other {user}"), &template);
        }
        let member = trial % 2 == 0;
        for user in 0..holders {
            let user = format!("victim {user}");
            let own = [template.clone(), text(900_000 + trial, 20)].concat();
            learn(
                &mut ledger,
                "acme",
                &user,
                if member { &secret } else { &own },
            );
        }
        let store = worker(&ledger);
        // From the template's end on, and from within the secret.
        let score = drafted(&store, attacker, "attacker", &secret)
            + drafted(&store, attacker, "attacker", &secret[template.len()..]);
        scores[usize::from(member)].push(score);
    }
    let [strangers, members] = scores;
    let (n, m) = (members.len() as f64, strangers.len() as f64);
    // Of the rank sum without a signal (Mann, Whitney 1947).
    let error = ((n + m + 1.0) / (12.0 * n * m)).sqrt();
    (auc(&members, &strangers), 1.96 * error)
}

#[test]
fn private_text_gives_no_signal() {
    for (users, holders, attacker) in [(3, 2, "acme"), (2, 1, "acme"), (3, 3, "other tenant")] {
        let (auc, error) = probe(users, holders, attacker);
        assert!((auc - 0.5).abs() <= error, "{auc:.3} ± {error:.3}");
    }
}

/// The probe works: without anonymity it tells members from strangers.
#[test]
fn text_that_is_shared_does_give_a_signal() {
    for (users, holders) in [(1, 1), (3, 3)] {
        let (auc, error) = probe(users, holders, "acme");
        assert!(auc > 0.5 + error, "{auc:.3} ± {error:.3}");
    }
}
