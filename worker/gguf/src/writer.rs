//! Writing GGUF files.

use std::borrow::Cow;
use std::io::{self, Write};
use std::iter;

use indexmap::IndexMap;

use crate::reader::{DEFAULT_ALIGNMENT, alignment, data_len};
use crate::value::write_str;
use crate::{Fault, GgmlType, GgufError, Value};

/// Collects metadata and tensors and writes them as GGUF version 3.
///
/// What it writes, [`Gguf`](crate::Gguf) reads: names are unique, shapes fit types, and data
/// fits shapes.
pub struct GgufWriter<'a> {
    alignment: usize,
    metadata: IndexMap<String, Value>,
    tensors: IndexMap<String, Tensor<'a>>,
}

struct Tensor<'a> {
    ty: GgmlType,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl Default for GgufWriter<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> GgufWriter<'a> {
    /// A file of nothing.
    pub fn new() -> Self {
        Self {
            alignment: DEFAULT_ALIGNMENT,
            metadata: IndexMap::new(),
            tensors: IndexMap::new(),
        }
    }

    /// Adds a metadata entry. `general.alignment` is obeyed.
    pub fn metadata(&mut self, key: &str, value: impl Into<Value>) -> Result<(), GgufError> {
        let key = key.to_owned();
        if self.metadata.contains_key(&key) {
            return Err(GgufError::DuplicateKey { key });
        }
        self.metadata.insert(key, value.into());
        self.alignment = alignment(&self.metadata)?;
        Ok(())
    }

    /// Adds a tensor: `shape` is row-major, `data` is what [`quantize`](crate::quantize) makes.
    pub fn tensor(
        &mut self,
        name: &str,
        ty: GgmlType,
        shape: &[usize],
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<(), GgufError> {
        let (name, shape, data) = (name.to_owned(), shape.to_owned(), data.into());
        let needed = match data_len(ty, &shape) {
            Ok(needed) => needed,
            Err(fault) => return Err(GgufError::Tensor { name, fault }),
        };
        let found = data.len();
        if found != needed {
            let fault = Fault::DataLength { needed, found };
            return Err(GgufError::Tensor { name, fault });
        }
        if self.tensors.contains_key(&name) {
            return Err(GgufError::DuplicateTensor { name });
        }
        self.tensors.insert(name, Tensor { ty, shape, data });
        Ok(())
    }

    /// Writes the file.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.parts().try_for_each(|part| out.write_all(&part))
    }

    /// The file in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.parts().for_each(|part| bytes.extend_from_slice(&part));
        bytes
    }

    /// The header and every tensor, each padded to the alignment.
    fn parts(&self) -> impl Iterator<Item = Cow<'_, [u8]>> {
        let data = self.tensors.values().map(|tensor| (&*tensor.data).into());
        iter::once(self.header().into())
            .chain(data)
            .flat_map(|part: Cow<'_, [u8]>| {
                let padding = part.len().next_multiple_of(self.alignment) - part.len();
                [part, vec![0; padding].into()]
            })
    }

    fn header(&self) -> Vec<u8> {
        let mut header = b"GGUF\x03\0\0\0".to_vec();
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            write_str(&mut header, key);
            value.write(&mut header);
        }
        let mut offset = 0;
        for (name, tensor) in &self.tensors {
            write_str(&mut header, name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for &dimension in tensor.shape.iter().rev() {
                header.extend((dimension as u64).to_le_bytes());
            }
            header.extend(tensor.ty.id().to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset = (offset + tensor.data.len()).next_multiple_of(self.alignment);
        }
        header
    }
}
