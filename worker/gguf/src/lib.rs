//! GGUF model files: a hardened reader, the block formats of their weights, and a writer.
//!
//! A file is a claim, not a fact: [`Gguf`] checks every length, count, offset and extent
//! against the bytes that are there before it believes one, and allocates in proportion to
//! the file. What it returns can be read without further checks.
//!
//! ```no_run
//! # fn main() -> Result<(), shoal_gguf::GgufError> {
//! let gguf = shoal_gguf::Gguf::open("model.gguf".as_ref())?;
//! let layers: u32 = gguf.require("llama.block_count")?;
//! let name = gguf.get::<&str>("general.name")?.unwrap_or("unnamed");
//! for tensor in gguf.tensors() {
//!     println!("{} {} {:?}", tensor.name, tensor.ty, tensor.shape);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

#![deny(unsafe_code)]

pub mod codec;
mod cursor;
mod error;
mod reader;
mod types;
mod value;
mod writer;

pub use codec::{dequantize, quantize};
pub use error::{Fault, GgufError};
pub use reader::{Gguf, TensorView};
pub use types::GgmlType;
pub use value::{Array, FromValue, Strings, Value, ValueType};
pub use writer::GgufWriter;
