//! What can be wrong with a model file.

use std::path::PathBuf;

use shoal_core::Class;

use crate::GgmlType;

/// Why a file cannot be read as GGUF, or does not say what its reader needs.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file system refused.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The first bytes are not `GGUF`.
    #[error("not a GGUF file: it starts with {magic:?}, not with \"GGUF\"")]
    NotGguf {
        /// The first bytes, as many as there are of four.
        magic: Vec<u8>,
    },
    /// The file was made for big-endian machines.
    #[error("big-endian GGUF files are not supported")]
    BigEndian,
    /// A version of the format that is older or newer than 2 and 3.
    #[error("GGUF version {version} is not supported, only 2 and 3 are")]
    Version {
        /// As the header says.
        version: u32,
    },
    /// The fixed header is wrong.
    #[error("GGUF header: {fault}")]
    Header {
        /// What is wrong with it.
        fault: Fault,
    },
    /// The name of a metadata entry is wrong.
    #[error("key of metadata entry {index}: {fault}")]
    Key {
        /// Which entry, from 0.
        index: u64,
        /// What is wrong with its key.
        fault: Fault,
    },
    /// The value of a metadata entry is wrong.
    #[error("metadata `{key}`: {fault}")]
    Metadata {
        /// The entry.
        key: String,
        /// What is wrong with its value.
        fault: Fault,
    },
    /// Two metadata entries have one name.
    #[error("metadata `{key}` occurs twice")]
    DuplicateKey {
        /// The name.
        key: String,
    },
    /// The name of a tensor is wrong.
    #[error("name of tensor {index}: {fault}")]
    TensorName {
        /// Which tensor, from 0.
        index: u64,
        /// What is wrong with its name.
        fault: Fault,
    },
    /// The description of a tensor is wrong.
    #[error("tensor `{name}`: {fault}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// Two tensors have one name.
    #[error("tensor `{name}` occurs twice")]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// A metadata entry that the reader needs is not there.
    #[error("metadata `{key}` is missing")]
    MissingKey {
        /// The name.
        key: String,
    },
    /// A metadata entry has another type, or a number that its reader cannot hold.
    #[error("metadata `{key}` is {found}, not {expected}")]
    WrongType {
        /// The entry.
        key: String,
        /// What the reader asked for.
        expected: &'static str,
        /// What it is: its type, and its value if that is a number.
        found: String,
    },
}

impl GgufError {
    /// A model file is the deployment's: no request mends it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

/// What is wrong with one part of a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A length points beyond the end of the file.
    #[error("needs {needed} bytes at offset {offset}, but the file ends after {left} of them")]
    Truncated {
        /// Where the bytes should be.
        offset: usize,
        /// How many are claimed.
        needed: u64,
        /// How many are there.
        left: usize,
    },
    /// More entries are claimed than bytes of the file could hold.
    #[error("claims {count} {what}, more than its bytes can hold")]
    TooMany {
        /// Entries of this kind.
        what: &'static str,
        /// As many as the header claims.
        count: u64,
    },
    /// A name is too long.
    #[error("is {len} bytes long, at most {most} are allowed")]
    NameTooLong {
        /// Its length.
        len: u64,
        /// The limit.
        most: u64,
    },
    /// A string is not UTF-8.
    #[error("is not UTF-8 at byte {offset} of the file")]
    NotUtf8 {
        /// Where the string stops being UTF-8.
        offset: usize,
    },
    /// The type of a value is none of GGUF's.
    #[error("has the unknown value type {id}")]
    UnknownValueType {
        /// As the file says.
        id: u32,
    },
    /// An array of arrays.
    #[error("is an array of arrays, which no known model uses")]
    NestedArray,
    /// A boolean that is neither 0 nor 1.
    #[error("has a boolean of {byte}, neither 0 nor 1")]
    NotBool {
        /// As the file says.
        byte: u8,
    },
    /// An alignment that aligns nothing.
    #[error("must be a power of two of type u32, not {found}")]
    Alignment {
        /// As the file says.
        found: String,
    },
    /// A type of weights that Shoal cannot compute with.
    #[error("has type {}, which is not supported", foreign(*id))]
    UnsupportedType {
        /// As the file says.
        id: u32,
    },
    /// A tensor of no or too many dimensions.
    #[error("has {count} dimensions, not 1 to 4")]
    Dimensions {
        /// As the file says.
        count: u32,
    },
    /// A dimension is 0, or the product of all overflows.
    #[error("has the impossible shape {shape:?}")]
    Shape {
        /// As the file says, the row length first.
        shape: Vec<u64>,
    },
    /// A row that ends within a block.
    #[error("has rows of {columns} weights, no whole number of {ty} blocks")]
    PartialBlock {
        /// The length of a row.
        columns: usize,
        /// The type of the tensor.
        ty: GgmlType,
    },
    /// The data starts at an offset off the alignment.
    #[error("starts at offset {offset} of the data, off the alignment of {alignment}")]
    Misaligned {
        /// As the file says.
        offset: u64,
        /// Of the file.
        alignment: usize,
    },
    /// The data shares bytes with another tensor's.
    #[error("overlaps the data of tensor `{other}`")]
    Overlap {
        /// The other tensor.
        other: String,
    },
    /// Data to be written has another length than the tensor needs.
    #[error("needs {needed} bytes of data, not {found}")]
    DataLength {
        /// What shape and type need.
        needed: usize,
        /// What was given.
        found: usize,
    },
}

fn foreign(id: u32) -> String {
    crate::types::foreign_name(id).map_or_else(|| format!("number {id}"), str::to_owned)
}

impl GgufError {
    pub(crate) fn wrong_type(key: &str, expected: &'static str, found: String) -> Self {
        Self::WrongType {
            key: key.to_owned(),
            expected,
            found,
        }
    }
}
