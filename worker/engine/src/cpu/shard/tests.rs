use proptest::prelude::*;

use super::*;
use crate::tests::fake;

fn smollm2() -> ModelSpec {
    ModelSpec {
        n_head: 9,
        n_kv_head: 3,
        head_dim: 64,
        d_ff: 1536,
        ..fake::spec(49152, 8192)
    }
}

fn plan(world: usize) -> Vec<Shard> {
    ShardPlan::new(&smollm2(), world).unwrap().shards
}

#[test]
fn one_rank_has_all() {
    let all = Shard {
        rank: 0,
        q: 0..9,
        kv: 0..3,
        ff: 0..1536,
        vocab: 0..49152,
    };
    assert_eq!(plan(1), [all]);
}

#[test]
fn three_key_value_heads_on_two_three_and_five_ranks() {
    let of = |shards: &[Shard]| -> Vec<_> {
        shards
            .iter()
            .map(|s| (s.q.clone(), s.kv.clone(), s.ff.len(), s.vocab.len()))
            .collect()
    };
    assert_eq!(
        of(&plan(2)),
        [(0..5, 0..2, 768, 24576), (5..9, 1..3, 768, 24576)]
    );
    assert_eq!(
        of(&plan(3)),
        [0, 1, 2].map(|i| (3 * i..3 * i + 3, i..i + 1, 512, 16384))
    );
    // Two ranks share a head: one has two of its queries, the other one, and more of the
    // rest.
    let five = plan(5);
    let heads: Vec<_> = five.iter().map(|s| (s.q.clone(), s.kv.clone())).collect();
    let expected = [
        (0..2, 0..1),
        (2..3, 0..1),
        (3..5, 1..2),
        (5..6, 1..2),
        (6..9, 2..3),
    ];
    assert_eq!(heads, expected);
    let ff: Vec<_> = five.iter().map(|s| s.ff.len()).collect();
    assert_eq!(ff, [288, 320, 320, 320, 288]);
    assert_eq!(plan(9).iter().map(|s| s.q.len()).max(), Some(1));
}

#[test]
fn the_slowest_shares_and_the_meetings_are_what_a_step_takes() {
    let spec = ModelSpec {
        n_layer: 30,
        d_model: 576,
        ..smollm2()
    };
    let of = |world| {
        let plan = ShardPlan::new(&spec, world).unwrap();
        plan.estimate(&spec, 96_400_000, 2, None)
    };
    let share = |world| {
        let (ranks, one) = (of(world).ranks(), of(world).one);
        ranks.as_secs_f64() / one.as_secs_f64()
    };
    assert_eq!(of(1).ranks(), of(1).one);
    // Five of nine heads are a ninth more than half of a fifth of the weights.
    assert!((1.10..1.17).contains(&share(2)), "{}", share(2));
    // A rank of one thread waits for no other within its phases.
    let plan = ShardPlan::new(&spec, 2).unwrap();
    let estimate = plan.estimate(&spec, 96_400_000, 1, None);
    let (ranks, one) = (estimate.ranks(), estimate.one);
    assert!(ranks < one);
    // Three ranks have equal shares, and only meet.
    assert_eq!(of(3).shares, of(3).one);
    let meetings = of(3).meetings;
    assert_eq!((meetings.as_secs_f64() * 1e6).round(), 63.0 * 4.0);
    assert!(share(9) > share(3));
}

#[test]
fn ranks_on_machines_of_their_own_are_weighed_against_one_machine() {
    let spec = ModelSpec {
        n_layer: 30,
        d_model: 576,
        ..smollm2()
    };
    let of = |payload, micros, bytes: u64| {
        let pace = Pace {
            latency: Duration::from_micros(micros),
            rate: 1e9 / payload as f64,
        };
        let payload = match payload {
            2 => Payload::Bf16,
            _ => Payload::F32,
        };
        let plan = ShardPlan::new(&spec, 3).unwrap().with_payload(payload);
        plan.estimate(&spec, bytes, 1, Some(pace))
    };
    let near = of(2, 20, 96_400_000);
    // Three equal shares of the weights.
    let third = near.one.as_secs_f64() / 3.0;
    assert!((near.shares.as_secs_f64() / third - 1.0).abs() < 1e-6);
    assert_eq!(near.saved(), near.one - near.shares);
    // 61 sums, the plan, and the logits of a rank with 4 bytes each.
    let bytes = 61.0 * 2.0 * 576.0 + 49152.0 / 3.0 * 4.0;
    let expected = 63.0 * 20e-6 + bytes / 1e9;
    assert!((near.meetings.as_secs_f64() / expected - 1.0).abs() < 1e-3);
    assert!(near.ranks() < near.one);
    assert!(of(4, 20, 96_400_000).meetings > near.meetings);
    let far = of(2, 200, 96_400_000);
    assert!(far.ranks() > far.one, "for a small model");
    let large = of(2, 200, 4_000_000_000);
    assert!(large.ranks() < large.one);
}

#[test]
fn what_cannot_be_split_is_refused() {
    let too_many = |world, what, most| Err(ShardError::TooMany { world, what, most });
    assert_eq!(
        ShardPlan::new(&smollm2(), 10),
        too_many(10, "the query heads", 9)
    );
    assert_eq!(ShardPlan::new(&smollm2(), 0), too_many(0, "a group", 16));
    assert_eq!(ShardPlan::new(&smollm2(), 17), too_many(17, "a group", 16));
    let narrow = ModelSpec {
        d_ff: 64,
        ..smollm2()
    };
    assert_eq!(
        ShardPlan::new(&narrow, 3),
        too_many(3, "the feed-forward layer", 2)
    );
    let odd = ModelSpec {
        head_dim: 16,
        ..smollm2()
    };
    assert_eq!(
        ShardPlan::new(&odd, 2),
        Err(ShardError::Heads {
            heads: 3,
            width: 16
        })
    );
}

proptest! {
    #[test]
    fn every_row_has_its_ranks(
        (kv, group, world) in (1usize..9, 1usize..9, 1usize..17),
        blocks in 16usize..200,
        vocab in 1024usize..5000,
    ) {
        let spec = ModelSpec {
            n_head: kv * group,
            n_kv_head: kv,
            d_ff: 32 * blocks,
            ..fake::spec(vocab, 8192)
        };
        let spec = ModelSpec { head_dim: 64, ..spec };
        let Ok(plan) = ShardPlan::new(&spec, world) else {
            prop_assert!(world > kv * group);
            return Ok(());
        };
        let shards = plan.shards();
        prop_assert_eq!(shards.len(), world);
        let mut ends = [0; 3];
        for shard in shards {
            prop_assert_eq!([shard.q.start, shard.ff.start, shard.vocab.start], ends);
            ends = [shard.q.end, shard.ff.end, shard.vocab.end];
            prop_assert!(!shard.q.is_empty() && !shard.ff.is_empty());
            prop_assert!(!shard.vocab.is_empty());
            prop_assert!(shard.vocab.start.is_multiple_of(logits::BLOCK));
            // Each query head is beside its key-value head.
            prop_assert_eq!(shard.q.start / group, shard.kv.start);
            prop_assert_eq!((shard.q.end - 1) / group + 1, shard.kv.end);
            prop_assert!(shard.kv.len() <= kv.div_ceil(world));
        }
        prop_assert_eq!(ends, [kv * group, 32 * blocks, vocab]);
    }
}
