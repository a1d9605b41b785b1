//! A batch, as tensors on the device.

use candle_core::{DType, Device, Result, Tensor};
use shoal_core::PAGE_TOKENS;

use crate::backend::{Batch, Segment};
use crate::spec::ModelSpec;

/// What one step needs, the same for every layer.
pub(super) struct StepPlan {
    /// `[rows]`.
    pub(super) tokens: Tensor,
    /// Of the rotation angles, `[rows, pairs]`, times the magnitude.
    pub(super) cos: Tensor,
    /// Like `cos`.
    pub(super) sin: Tensor,
    /// KV slot of every row, repeated over the width of a key: `[rows, n_kv_head * head_dim]`.
    pub(super) slots: Tensor,
    /// In row order.
    pub(super) segments: Vec<SegmentPlan>,
    /// `[wanted]`; `None` where no row wants logits.
    pub(super) logit_rows: Option<Tensor>,
}

/// One segment's part in attention.
pub(super) struct SegmentPlan {
    /// First row of the batch.
    pub(super) start: usize,
    /// Its rows.
    pub(super) rows: usize,
    /// KV slots of its sequence from position 0 to its last row: `[span]`.
    pub(super) span: Tensor,
    /// 0 where a row may look, minus infinity elsewhere, `[rows, span]`; `None` for a single
    /// row, which sees all of its span.
    pub(super) mask: Option<Tensor>,
}

impl StepPlan {
    pub(super) fn new(batch: &Batch<'_>, spec: &ModelSpec, device: &Device) -> Result<Self> {
        let rows = batch.tokens.len();
        let (cos, sin) = rotations(batch.positions, spec, device)?;
        let slots: Vec<u32> = batch
            .segments
            .iter()
            .flat_map(|segment| {
                let positions = &batch.positions[range(segment)];
                positions.iter().map(move |&p| slot(batch, segment, p))
            })
            .collect();
        let slots = Tensor::from_vec(slots, (rows, 1), device)?
            .broadcast_as((rows, spec.n_kv_head * spec.head_dim))?
            .contiguous()?;
        let segments = batch
            .segments
            .iter()
            .filter(|segment| !segment.rows.is_empty())
            .map(|segment| SegmentPlan::new(batch, segment, device))
            .collect::<Result<_>>()?;
        let logit_rows = match batch.logit_rows {
            [] => None,
            wanted => Some(Tensor::new(wanted, device)?),
        };
        Ok(Self {
            tokens: Tensor::new(batch.tokens, device)?,
            cos,
            sin,
            slots,
            segments,
            logit_rows,
        })
    }
}

impl SegmentPlan {
    fn new(batch: &Batch<'_>, segment: &Segment, device: &Device) -> Result<Self> {
        let rows = segment.rows.len();
        let first = batch.positions[segment.rows.start as usize];
        let span = first + rows as u32;
        let slots: Vec<u32> = (0..span).map(|p| slot(batch, segment, p)).collect();
        let mask = (rows > 1).then(|| causal_mask(first as usize, rows, device));
        Ok(Self {
            start: segment.rows.start as usize,
            rows,
            span: Tensor::new(slots, device)?,
            mask: mask.transpose()?,
        })
    }
}

fn range(segment: &Segment) -> std::ops::Range<usize> {
    segment.rows.start as usize..segment.rows.end as usize
}

/// Where the KV pool holds a position of the segment's sequence.
fn slot(batch: &Batch<'_>, segment: &Segment, position: u32) -> u32 {
    let pages = &batch.page_table[segment.pages.start as usize..segment.pages.end as usize];
    let (page, offset) = (
        position as usize / PAGE_TOKENS,
        position % PAGE_TOKENS as u32,
    );
    pages[page] * PAGE_TOKENS as u32 + offset
}

/// The mask of `rows` rows after `before` earlier positions.
fn causal_mask(before: usize, rows: usize, device: &Device) -> Result<Tensor> {
    let span = before + rows;
    let mask: Vec<f32> = (0..rows)
        .flat_map(|row| {
            (0..span).map(move |p| {
                if p <= before + row {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
        })
        .collect();
    Tensor::from_vec(mask, (rows, span), device)
}

fn rotations(positions: &[u32], spec: &ModelSpec, device: &Device) -> Result<(Tensor, Tensor)> {
    let rope = &spec.rope;
    let angles = || {
        positions
            .iter()
            .flat_map(|&p| rope.inv_freq.iter().map(move |&freq| p as f32 * freq))
    };
    let shape = (positions.len(), rope.inv_freq.len());
    let table = |values: Vec<f32>| Tensor::from_vec(values, shape, device)?.to_dtype(DType::F32);
    Ok((
        table(angles().map(|a| a.cos() * rope.magnitude).collect())?,
        table(angles().map(|a| a.sin() * rope.magnitude).collect())?,
    ))
}
