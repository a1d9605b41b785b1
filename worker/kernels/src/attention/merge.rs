//! How the spans of a query become one, in ascending order.

use super::{MAX_QUERIES, Query, SPAN, partial_width};
use crate::math::exp2;
use crate::simd::{LANES, Lanes};

/// For every query the greatest score and the sum of the weights.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    pub(super) max: [f32; MAX_QUERIES],
    pub(super) sum: [f32; MAX_QUERIES],
}

impl Softmax {
    pub(super) const NOTHING: Self = Self {
        max: [f32::NEG_INFINITY; MAX_QUERIES],
        sum: [0.0; MAX_QUERIES],
    };

    /// Of what is left of a span, or of the first ones.
    fn of(partials: &[f32], hd: usize) -> Self {
        let mut softmax = Self::NOTHING;
        for (i, partial) in partials.chunks_exact(partial_width(hd)).enumerate() {
            (softmax.max[i], softmax.sum[i]) = (partial[hd], partial[hd + 1]);
        }
        softmax
    }

    /// After the first spans, if there are any before; their weighted sums are in `out`.
    pub(super) fn after(begin: Option<&[f32]>, queries: &[Query<'_>], out: &mut [f32]) -> Self {
        let hd = queries[0].head_dim();
        for (i, query) in queries.iter().enumerate() {
            let out = &mut out[query.out..query.out + hd];
            match begin {
                Some(begin) => out.copy_from_slice(&begin[i * partial_width(hd)..][..hd]),
                None => out.fill(0.0),
            }
        }
        begin.map_or(Self::NOTHING, |begin| Self::of(begin, hd))
    }

    /// Takes in a span; what the outputs so far, and that of the span, are to be multiplied with.
    ///
    /// # Safety
    /// See [`Lanes`].
    #[inline(always)]
    pub(super) unsafe fn merge<L: Lanes>(
        &mut self,
        span: &Self,
        n: usize,
    ) -> [[f32; MAX_QUERIES]; 2] {
        let mut factors = [[0.0; MAX_QUERIES]; 2];
        for i in (0..n).step_by(LANES) {
            // SAFETY: whole vectors of the arrays.
            unsafe {
                let load = |x: &[f32; MAX_QUERIES]| L::load(x.as_ptr().add(i));
                let (max, span_max) = (load(&self.max), load(&span.max));
                let top = max.max(span_max);
                let (old, new) = (exp2(max.sub(top)), exp2(span_max.sub(top)));
                let sum = load(&span.sum).fma(new, load(&self.sum).mul(old));
                top.store(self.max.as_mut_ptr().add(i));
                sum.store(self.sum.as_mut_ptr().add(i));
                old.store(factors[0].as_mut_ptr().add(i));
                new.store(factors[1].as_mut_ptr().add(i));
            }
        }
        factors
    }
}

/// # Safety
/// See [`Lanes`]; shapes as [`merge_spans`](super::merge_spans) checks them.
#[inline(always)]
pub(super) unsafe fn merged<L: Lanes>(
    queries: &[Query<'_>],
    (begin, spans, rest): (Option<&[f32]>, usize, &[f32]),
    out: &mut [f32],
) {
    let (n, hd) = (queries.len(), queries[0].head_dim());
    let width = partial_width(hd);
    let mut running = Softmax::after(begin, queries, out);
    for (index, partials) in (spans..).zip(rest.chunks_exact(n * width)) {
        let softmax = Softmax::of(partials, hd);
        // SAFETY: the contract of this function.
        unsafe {
            let [old, new] = running.merge::<L>(&softmax, n);
            for (i, query) in queries.iter().enumerate() {
                if query.len > index * SPAN {
                    let (o, total) = (&partials[i * width..], out[query.out..].as_mut_ptr());
                    add::<L>(total, old[i], o.as_ptr(), new[i], hd);
                }
            }
        }
    }
    for (query, sum) in queries.iter().zip(running.sum) {
        // SAFETY: as above.
        unsafe { divide::<L>(&mut out[query.out..query.out + hd], sum) };
    }
}

/// `total = total * old + span * new`.
///
/// # Safety
/// See [`Lanes`]; both stand for `hd` elements, whole lanes.
#[inline(always)]
pub(super) unsafe fn add<L: Lanes>(
    total: *mut f32,
    old: f32,
    span: *const f32,
    new: f32,
    hd: usize,
) {
    // SAFETY: the contract of this function.
    unsafe {
        let (old, new) = (L::splat(old), L::splat(new));
        for d in (0..hd).step_by(LANES) {
            let merged = L::load(span.add(d)).fma(new, L::load(total.add(d)).mul(old));
            merged.store(total.add(d));
        }
    }
}

/// # Safety
/// See [`Lanes`]; whole lanes.
#[inline(always)]
pub(super) unsafe fn divide<L: Lanes>(out: &mut [f32], sum: f32) {
    // SAFETY: the contract of this function.
    unsafe {
        let scale = L::splat(1.0 / sum);
        for lanes in out.chunks_exact_mut(LANES) {
            L::load(lanes.as_ptr()).mul(scale).store(lanes.as_mut_ptr());
        }
    }
}
