//! Tests of the whole engine, on a backend whose logits show every mistake in a page table.

mod engine;
pub(crate) mod fake;
mod laws;
mod lead;
mod policy;
mod rig;
mod scoring;
mod speculation;
