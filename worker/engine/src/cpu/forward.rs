//! The forward pass of a rank, and where it meets the others.

use shoal_collective::{Collective, CollectiveError};
use shoal_kernels::elementwise::{add, fill_rows, norm_quantize, place};
use shoal_kernels::gemm::{self, Write, gated, multiply};
use shoal_kernels::logits::BLOCK;
use shoal_kernels::norm::rms_norm_in_place;
use shoal_kernels::quant::Activations;
use shoal_kernels::rope::{fill_table, rotate_halves, rotate_interleaved};
use shoal_kernels::team::Team;

use super::{CpuBackend, Phase};
use crate::backend::Batch;
use crate::spec::RopeKind;

/// A rank's seat, where there are several.
pub(super) type Group = Option<Box<dyn Collective>>;

/// Adds a map of `acts` to the residual `x`: the whole map of one rank, or the parts of all
/// ranks in their order, which gives every rank the same bits.
fn add_output(
    team: &mut Team,
    group: &mut Group,
    linear: gemm::Linear<'_>,
    acts: &Activations,
    rows: usize,
    x: &mut [f32],
) -> Result<(), CollectiveError> {
    let Some(group) = group else {
        multiply(team, linear, acts, rows, x, Write::Add);
        return Ok(());
    };
    let part = group.part(x.len())?;
    multiply(team, linear, acts, rows, part, Write::Set);
    add(team, x, &group.exchange()?);
    Ok(())
}

impl CpuBackend {
    /// Runs the batch that the plan was set to. `logits` is that of rank 0.
    pub(super) fn forward(
        &mut self,
        batch: &Batch<'_>,
        logits: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.embed(batch)?;
        self.times.lap(Phase::Begin);
        for layer in 0..self.spec.n_layer {
            self.project(layer);
            if layer + 1 == self.spec.n_layer {
                self.keep_wanted(batch);
                self.times.lap(Phase::Begin);
                if batch.logit_rows.is_empty() {
                    return Ok(());
                }
            }
            self.attend(layer)?;
            self.feed_forward(layer)?;
        }
        self.head(logits)
    }

    fn embed(&mut self, batch: &Batch<'_>) -> Result<(), CollectiveError> {
        let (s, team, width) = (&mut self.scratch, &mut self.team, self.spec.d_model);
        let rows = batch.tokens.len();
        let x = &mut s.residual[..rows * width];
        let embed = |row: usize, x: &mut [f32]| self.weights.embed(batch.tokens[row], x);
        match &mut self.group {
            None => fill_rows(team, x, width, embed),
            Some(group) => {
                fill_rows(team, group.part(x.len())?, width, embed);
                x.fill(0.0);
                add(team, x, &group.exchange()?);
            }
        }
        let spec = &self.spec.rope;
        let width = 2 * spec.inv_freq.len();
        fill_rows(team, &mut s.rope[..rows * width], width, |row, table| {
            fill_table(batch.positions[row], &spec.inv_freq, spec.magnitude, table);
        });
        Ok(())
    }

    fn project(&mut self, index: usize) {
        let (spec, isa, team) = (&self.spec, self.options.isa, &mut self.team);
        let (layer, rows) = (&self.weights.layers[index], self.plan.rows());
        let s = &mut self.scratch;
        let x = &mut s.residual[..rows * spec.d_model];
        norm_quantize(team, x, &layer.attn_norm, spec.rms_eps, &mut s.attn_in);
        self.times.lap(Phase::Norm);

        let heads = self.heads;
        let (tables, table_width) = (&s.rope, 2 * spec.rope.inv_freq.len());
        let inputs = (self.weights.linear(&layer.qkv), &s.attn_in);
        self.kv.project(
            team,
            index,
            &self.plan,
            inputs,
            &mut s.queries,
            &|row, head, values| {
                if spec.qkv_bias {
                    let bias = &layer.qkv_bias[head * heads.dim..][..heads.dim];
                    values.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
                }
                if head >= heads.q + heads.kv {
                    return;
                }
                if spec.qk_norm {
                    let weight = if head < heads.q {
                        &layer.q_norm
                    } else {
                        &layer.k_norm
                    };
                    rms_norm_in_place(isa, values, weight, spec.rms_eps);
                }
                let table = &tables[row * table_width..][..table_width];
                match spec.rope.kind {
                    RopeKind::Interleaved => rotate_interleaved(isa, values, table),
                    RopeKind::Halves => rotate_halves(isa, values, table),
                }
            },
        );
        self.times.lap(Phase::Qkv);
    }

    fn attend(&mut self, index: usize) -> Result<(), CollectiveError> {
        let (layer, rows) = (&self.weights.layers[index], self.plan.rows());
        let (team, s) = (&mut self.team, &mut self.scratch);
        let x = &mut s.residual[..rows * self.spec.d_model];
        self.kv
            .attend(team, index, &mut self.plan, &s.queries, &mut s.attn_out);
        self.times.lap(Phase::Attention);
        let output = self.weights.linear(&layer.attn_output);
        add_output(team, &mut self.group, output, &s.attn_out, rows, x)?;
        self.times.lap(Phase::Output);
        Ok(())
    }

    fn feed_forward(&mut self, index: usize) -> Result<(), CollectiveError> {
        let (spec, team) = (&self.spec, &mut self.team);
        let (layer, rows) = (&self.weights.layers[index], self.plan.rows());
        let s = &mut self.scratch;
        let x = &mut s.residual[..rows * spec.d_model];
        norm_quantize(team, x, &layer.ffn_norm, spec.rms_eps, &mut s.ffn_in);
        self.times.lap(Phase::Norm);
        let gate_up = self.weights.linear(&layer.gate_up);
        gated(team, gate_up, &s.ffn_in, rows, &mut s.ffn_out);
        self.times.lap(Phase::GateUp);
        let down = self.weights.linear(&layer.down);
        add_output(team, &mut self.group, down, &s.ffn_out, rows, x)?;
        self.times.lap(Phase::Down);
        Ok(())
    }

    fn head(&mut self, logits: &mut [f32]) -> Result<(), CollectiveError> {
        let (spec, team, s) = (&self.spec, &mut self.team, &mut self.scratch);
        let (weight, rows) = (&self.weights.output_norm, self.plan.rows());
        let x = &s.residual[..rows * spec.d_model];
        norm_quantize(team, x, weight, spec.rms_eps, &mut s.head);
        self.times.lap(Phase::Norm);
        let head = self.weights.linear(&self.weights.head);
        if let Some(group) = self.group.as_mut().filter(|group| group.rank() > 0) {
            // Logits, then the maxima of their blocks.
            let (width, blocks) = (head.n(), head.n().div_ceil(BLOCK));
            let part = group.part(rows * (width + blocks))?;
            let (logits, maxima) = part.split_at_mut(rows * width);
            let to = (logits, width);
            gemm::logits(team, head, &s.head, rows, to, (maxima, blocks));
            self.times.lap(Phase::Head);
            group.gather()?;
            return Ok(());
        }
        let (width, blocks) = (spec.vocab, spec.vocab.div_ceil(BLOCK));
        let to = (&mut *logits, width);
        gemm::logits(team, head, &s.head, rows, to, (&mut s.maxima, blocks));
        self.times.lap(Phase::Head);
        let Some(group) = &mut self.group else {
            return Ok(());
        };
        group.part(0)?;
        let Some(parts) = group.gather()? else {
            return Ok(());
        };
        for (shard, part) in self.shards.shards().iter().zip(&*parts).skip(1) {
            let (vocab, of_blocks) = (shard.vocab.clone(), shard.vocab_blocks());
            let (got, expected) = (part.len(), rows * (vocab.len() + of_blocks.len()));
            if got != expected {
                return Err(CollectiveError::Mismatch {
                    rank: shard.rank,
                    got,
                    expected,
                });
            }
            let (part, maxima) = part.split_at(rows * vocab.len());
            place(team, part, vocab, logits, width);
            place(team, maxima, of_blocks, &mut s.maxima, blocks);
        }
        Ok(())
    }
}
