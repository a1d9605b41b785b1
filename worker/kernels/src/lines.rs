//! Numbers that begin at a cache line.

use std::ops::{Deref, DerefMut};

use crate::simd::LANES;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// A slice whose vectors of sixteen never lie across two cache lines: one that does takes twice as
/// long to load, and waits for what was stored there.
#[derive(Default)]
pub struct Lines(Box<[Line]>);

impl Lines {
    /// At least so many zeros, whole lines of them.
    pub fn new(len: usize) -> Self {
        Self(vec![Line([0.0; LANES]); len.div_ceil(LANES)].into())
    }

    /// Makes them so many at least; all are zeros then, if they were fewer.
    pub fn ensure(&mut self, len: usize) {
        if self.len() < len {
            *self = Self::new(len);
        }
    }
}

impl Deref for Lines {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a line is sixteen numbers and nothing else.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * LANES) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * LANES) }
    }
}
