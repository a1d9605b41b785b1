//! Which rows of the weights each rank of a tensor-parallel group has.
//!
//! Query heads go with their key-value heads, in contiguous groups; where there are more ranks
//! than key-value heads, ranks share one, each with its own copy of the keys and values, and
//! split its query heads. The ranks of a step meet after attention and after the feed-forward
//! layer, so what takes longer in one cannot be made up for in the other: feed-forward columns
//! and vocabulary are split evenly, in whole blocks and strips, and what does not divide goes to
//! the ranks with the fewest heads.

use std::ops::Range;
use std::time::Duration;

use sha2::{Digest, Sha256};
use shoal_collective::MAX_RANKS;
use shoal_core::Class;
use shoal_kernels::pack::STRIP;
use shoal_kernels::quant::BLOCK;

use crate::spec::ModelSpec;

/// Bytes of weights that a thread reads in a second, roughly.
const BANDWIDTH: f64 = 20e9;
/// What it costs the ranks of a machine to meet, roughly, seconds.
const MEETING: f64 = 4e-6;
/// What it costs the threads of a process to meet at the end of a phase, roughly, seconds.
const PHASE: f64 = 4e-6;
/// Phases of a layer.
const PHASES: usize = 5;

/// What one rank has of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The rank.
    pub rank: usize,
    /// Query heads.
    pub q: Range<usize>,
    /// Key-value heads.
    pub kv: Range<usize>,
    /// Columns of the feed-forward layer.
    pub ff: Range<usize>,
    /// Rows of the embedding and of the head.
    pub vocab: Range<usize>,
}

/// The shards of all ranks: a function of the model's shape and the number of ranks alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    shards: Vec<Shard>,
}

/// What a step is thought to take at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// In the ranks of a plan.
    pub ranks: Duration,
    /// In one process with as many threads.
    pub one: Duration,
}

/// Why a model cannot be split among so many ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// There are too many ranks for something that is split.
    #[error("{world} ranks cannot share {what}: at most {most} can")]
    TooMany {
        /// Ranks.
        world: usize,
        /// What is split.
        what: &'static str,
        /// Ranks that could share it.
        most: usize,
    },
    /// The heads of a rank do not fill whole blocks of activations.
    #[error("a rank would have {heads} heads of {width}, which are no whole blocks of {BLOCK}")]
    Heads {
        /// Query heads of the rank.
        heads: usize,
        /// Their width.
        width: usize,
    },
}

impl ShardError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

impl ShardPlan {
    /// Splits a model among `world` ranks.
    ///
    /// # Errors
    /// When there are more ranks than can have a part of everything, or a part is too odd.
    pub fn new(spec: &ModelSpec, world: usize) -> Result<Self, ShardError> {
        let group = spec.n_head / spec.n_kv_head;
        let blocks = spec.d_ff / BLOCK;
        let strips = spec.vocab.div_ceil(STRIP);
        for (what, most) in [
            ("a group", MAX_RANKS),
            ("the query heads", spec.n_kv_head * group),
            ("the feed-forward layer", blocks),
            ("the vocabulary", strips),
        ] {
            if !(1..=most).contains(&world) {
                return Err(ShardError::TooMany { world, what, most });
            }
        }
        let heads = heads(spec.n_kv_head, group, world);
        let mut fewest: Vec<usize> = (0..world).rev().collect();
        fewest.sort_by_key(|&rank| heads[rank].0.len());
        let ff = evenly(blocks, &fewest);
        let vocab = evenly(strips, &fewest);
        let times = |range: &Range<usize>, unit| range.start * unit..range.end * unit;
        let shards = heads.into_iter().enumerate().map(|(rank, (q, kv))| {
            let (heads, width) = (q.len(), spec.head_dim);
            if world > 1 && !(heads * width).is_multiple_of(BLOCK) {
                return Err(ShardError::Heads { heads, width });
            }
            let vocab = times(&vocab[rank], STRIP);
            Ok(Shard {
                rank,
                q,
                kv,
                ff: times(&ff[rank], BLOCK),
                vocab: vocab.start..vocab.end.min(spec.vocab),
            })
        });
        Ok(Self {
            shards: shards.collect::<Result<_, _>>()?,
        })
    }

    /// The shards, by rank.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.shards.len()
    }

    /// What the weights and the meetings of a step cost, where the weights have so many bytes:
    /// in these ranks with so many threads each, and in one process with all of the threads.
    pub fn estimate(&self, spec: &ModelSpec, bytes: u64, threads: usize) -> Estimate {
        let ModelSpec {
            n_layer,
            d_model,
            n_head,
            n_kv_head,
            head_dim,
            d_ff,
            vocab,
            ..
        } = *spec;
        // Queries and outputs, keys and values; gates, ups and downs; the head.
        let attention = |q: usize, kv: usize| (n_layer * 2 * (q + kv) * head_dim * d_model) as f64;
        let feed_forward = |ff: usize| (n_layer * 3 * ff * d_model) as f64;
        let head = |vocab: usize| (vocab * d_model) as f64;
        let all = attention(n_head, n_kv_head) + feed_forward(d_ff) + head(vocab);
        let most = |of: &dyn Fn(&Shard) -> f64| self.shards.iter().map(of).fold(0.0, f64::max);
        let slowest = most(&|s| attention(s.q.len(), s.kv.len()))
            + most(&|s| feed_forward(s.ff.len()))
            + most(&|s| head(s.vocab.len()));
        let thread = bytes as f64 / all / BANDWIDTH / threads as f64;
        let world = self.world();
        let meetings = if world > 1 { 2 * n_layer + 3 } else { 0 } as f64 * MEETING;
        let phases = |threads| if threads > 1 { PHASES * n_layer } else { 0 } as f64 * PHASE;
        let ranks = slowest * thread + meetings + phases(threads);
        let one = all * thread / world as f64 + phases(world * threads);
        Estimate {
            ranks: Duration::from_secs_f64(ranks),
            one: Duration::from_secs_f64(one),
        }
    }

    /// The split changes the order of sums, and so the bits of the results.
    pub(super) fn hash(&self, sha: &mut Sha256) {
        for shard in &self.shards {
            let Shard {
                rank: _,
                q,
                kv,
                ff,
                vocab,
            } = shard;
            for end in [q, kv, ff, vocab].map(|range| range.end) {
                sha.update((end as u64).to_le_bytes());
            }
        }
    }
}

/// Query heads and key-value heads of every rank, for `kv` heads with `group` queries each.
fn heads(kv: usize, group: usize, world: usize) -> Vec<(Range<usize>, Range<usize>)> {
    let order: Vec<usize> = (0..world.min(kv)).collect();
    if world <= kv {
        let of_rank = |kv: Range<usize>| (kv.start * group..kv.end * group, kv);
        return evenly(kv, &order).into_iter().map(of_rank).collect();
    }
    let ranks = evenly(world, &order);
    let mut all = Vec::with_capacity(world);
    for (kv, ranks) in ranks.into_iter().enumerate() {
        let order: Vec<usize> = (0..ranks.len()).collect();
        for q in evenly(group, &order) {
            all.push((kv * group + q.start..kv * group + q.end, kv..kv + 1));
        }
    }
    all
}

/// Contiguous shares of `units`, as equal as can be; what is left over goes to the first of
/// `order`, which names every share once.
fn evenly(units: usize, order: &[usize]) -> Vec<Range<usize>> {
    let (each, rest) = (units / order.len(), units % order.len());
    let mut counts = vec![each; order.len()];
    order[..rest].iter().for_each(|&share| counts[share] += 1);
    let mut end = 0;
    counts
        .into_iter()
        .map(|count| {
            end += count;
            end - count..end
        })
        .collect()
}

#[cfg(test)]
mod tests {
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
            [(0..6, 0..2, 768, 24576), (6..9, 2..3, 768, 24576)]
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
            plan.estimate(&spec, 96_400_000, 2)
        };
        let share = |world| {
            let Estimate { ranks, one } = of(world);
            ranks.as_secs_f64() / one.as_secs_f64()
        };
        assert_eq!(of(1).ranks, of(1).one);
        // Two of three heads are a third more than half of a fifth of the weights.
        assert!((1.17..1.20).contains(&share(2)), "{}", share(2));
        // A rank of one thread waits for no other within its phases.
        let plan = ShardPlan::new(&spec, 2).unwrap();
        let Estimate { ranks, one } = plan.estimate(&spec, 96_400_000, 1);
        assert!(ranks < one);
        // Three ranks have equal shares, and only meet.
        let meetings = of(3).ranks - of(3).one;
        assert_eq!((meetings.as_secs_f64() * 1e6).round(), 63.0 * 4.0);
        assert!(share(9) > share(3));
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
            vocab in 256usize..5000,
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
                // Each query head is beside its key-value head.
                prop_assert_eq!(shard.q.start / group, shard.kv.start);
                prop_assert_eq!((shard.q.end - 1) / group + 1, shard.kv.end);
                prop_assert!(shard.kv.len() == 1 || shard.q.len() == group * shard.kv.len());
            }
            prop_assert_eq!(ends, [kv * group, 32 * blocks, vocab]);
        }
    }
}
