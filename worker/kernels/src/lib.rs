//! The CPU kernels: packed weights, quantised activations and their product, attention over paged
//! keys and values, norms, rotations, and the threads to run them on. No model.
//!
//! One law holds in every module: a row's result has the same bits for every instruction
//! set, every batch size and every split of the work over threads.

pub mod amx;
pub mod arena;
pub mod attention;
pub mod elementwise;
pub mod gemm;
pub mod isa;
pub mod kv;
pub mod limits;
pub mod lines;
pub mod logits;
pub mod norm;
pub mod pack;
pub mod pool;
pub mod quant;
pub mod rope;
pub mod team;

mod bf16;
mod int16;
mod math;
mod simd;
#[cfg(test)]
mod testing;

pub use isa::Isa;
