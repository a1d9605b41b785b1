//! Which rows of the weights each rank of a tensor-parallel group has.
//!
//! Query heads go with their key-value heads, in contiguous groups. Ranks share a key-value head,
//! each with its own copy of the keys and values, and split its query heads, where there are more
//! ranks than key-value heads, and where that makes their shares of query heads more even and
//! nobody's keys and values more. The ranks of a step meet after attention and after the feed-
//! forward layer, so what takes longer in one cannot be made up for in the other: feed-forward
//! columns and vocabulary are split evenly, in whole blocks, and what does not divide goes to the
//! ranks with the fewest heads.

use std::ops::Range;
use std::time::Duration;

use sha2::{Digest, Sha256};
use shoal_collective::tcp::Payload;
use shoal_collective::{MAX_RANKS, Pace};
use shoal_core::Class;
use shoal_kernels::logits;
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
    /// Rows of the embedding and of the head, whole blocks of logits.
    pub vocab: Range<usize>,
}

impl Shard {
    /// The blocks of its logits.
    pub(super) fn vocab_blocks(&self) -> Range<usize> {
        self.vocab.start / logits::BLOCK..self.vocab.end.div_ceil(logits::BLOCK)
    }
}

/// The shards of all ranks, a function of the model's shape and the number of ranks alone, and
/// how the ranks put together what they compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    shards: Vec<Shard>,
    payload: Payload,
}

/// What a step of one row is thought to take at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// The weights, in the ranks of a plan: the largest share of each phase.
    pub shares: Duration,
    /// The meetings of the ranks.
    pub meetings: Duration,
    /// The weights, in one process.
    pub one: Duration,
}

impl Estimate {
    /// A step of the ranks.
    pub fn ranks(&self) -> Duration {
        self.shares + self.meetings
    }

    /// What the ranks save of the time for the weights.
    pub fn saved(&self) -> Duration {
        self.one.saturating_sub(self.shares)
    }
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
        let vocab_blocks = spec.vocab.div_ceil(logits::BLOCK);
        for (what, most) in [
            ("a group", MAX_RANKS),
            ("the query heads", spec.n_kv_head * group),
            ("the feed-forward layer", blocks),
            ("the vocabulary", vocab_blocks),
        ] {
            if !(1..=most).contains(&world) {
                return Err(ShardError::TooMany { world, what, most });
            }
        }
        let queries = queries(spec.n_kv_head, group, spec.head_dim, world);
        let mut fewest: Vec<usize> = (0..world).rev().collect();
        fewest.sort_by_key(|&rank| queries[rank].len());
        let ff = evenly(blocks, &fewest);
        let vocab = evenly(vocab_blocks, &fewest);
        let times = |range: &Range<usize>, unit| range.start * unit..range.end * unit;
        let shards = queries.into_iter().enumerate().map(|(rank, q)| {
            let (heads, width) = (q.len(), spec.head_dim);
            if world > 1 && !(heads * width).is_multiple_of(BLOCK) {
                return Err(ShardError::Heads { heads, width });
            }
            let vocab = times(&vocab[rank], logits::BLOCK);
            Ok(Shard {
                rank,
                kv: groups(&q, group),
                q,
                ff: times(&ff[rank], BLOCK),
                vocab: vocab.start..vocab.end.min(spec.vocab),
            })
        });
        Ok(Self {
            shards: shards.collect::<Result<_, _>>()?,
            payload: Payload::F32,
        })
    }

    /// The same plan, where ranks round the parts of sums to `payload` before they add them.
    #[must_use]
    pub fn with_payload(self, payload: Payload) -> Self {
        Self { payload, ..self }
    }

    /// What the parts of sums are rounded to.
    pub fn payload(&self) -> Payload {
        self.payload
    }

    /// The shards, by rank.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.shards.len()
    }

    /// What the weights and the meetings of a step cost, where the weights have so many bytes, in
    /// these ranks with so many threads each. Ranks on machines of their own meet at a pace that
    /// was measured, and one process would have the threads of one machine; without a pace, it
    /// would have those of all ranks.
    pub fn estimate(
        &self,
        spec: &ModelSpec,
        bytes: u64,
        threads: usize,
        pace: Option<Pace>,
    ) -> Estimate {
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
        let meetings = match pace {
            _ if world == 1 => 0.0,
            None => (2 * n_layer + 3) as f64 * MEETING,
            Some(pace) => {
                // The plan is small; logits are not rounded.
                let parts = (2 * n_layer + 1) as u32 * pace.exchange(d_model);
                let logits = 4 * vocab / world * BLOCK / self.payload.bytes(BLOCK);
                (parts + pace.latency + pace.exchange(logits)).as_secs_f64()
            }
        };
        let phases = |threads| if threads > 1 { PHASES * n_layer } else { 0 } as f64 * PHASE;
        let others = if pace.is_some() { 1 } else { world };
        let one = all * thread / others as f64 + phases(others * threads);
        Estimate {
            shares: Duration::from_secs_f64(slowest * thread + phases(threads)),
            meetings: Duration::from_secs_f64(meetings),
            one: Duration::from_secs_f64(one),
        }
    }

    /// The split changes the order of sums, the rounding their parts, and so both the bits of the
    /// results.
    pub(super) fn hash(&self, sha: &mut Sha256) {
        if self.payload != Payload::F32 {
            sha.update(self.payload.name());
        }
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

/// Query heads of every rank, for `kv` heads with `group` queries of this width each.
fn queries(kv: usize, group: usize, width: usize, world: usize) -> Vec<Range<usize>> {
    let order: Vec<usize> = (0..world).collect();
    let of_groups: Vec<_> = if world <= kv {
        let times = |kv: Range<usize>| kv.start * group..kv.end * group;
        evenly(kv, &order).into_iter().map(times).collect()
    } else {
        within_groups(kv, group, world)
    };
    let even = evenly(kv * group, &order);
    let most = |queries: &[Range<usize>]| queries.iter().map(|q| groups(q, group).len()).max();
    // Narrower heads fill no blocks of activations alone.
    match width.is_multiple_of(BLOCK) && most(&even) <= most(&of_groups) {
        true => even,
        false => of_groups,
    }
}

/// The key-value heads that query heads attend to.
fn groups(queries: &Range<usize>, group: usize) -> Range<usize> {
    queries.start / group..queries.end.div_ceil(group)
}

/// Query heads of every rank, none of which has two key-value heads.
fn within_groups(kv: usize, group: usize, world: usize) -> Vec<Range<usize>> {
    let order: Vec<usize> = (0..kv).collect();
    let mut all = Vec::with_capacity(world);
    for (kv, ranks) in evenly(world, &order).into_iter().enumerate() {
        let order: Vec<usize> = (0..ranks.len()).collect();
        for q in evenly(group, &order) {
            all.push(kv * group + q.start..kv * group + q.end);
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
mod tests;
