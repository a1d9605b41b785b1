//! The file as a whole.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use indexmap::IndexMap;
use memmap2::Mmap;

use crate::cursor::Cursor;
use crate::{Fault, FromValue, GgmlType, GgufError, Value};

const MAGIC: &[u8; 4] = b"GGUF";
/// Of tensor data, where the file does not say.
pub(crate) const DEFAULT_ALIGNMENT: usize = 32;
/// The entry that says.
const ALIGNMENT_KEY: &str = "general.alignment";
/// The limit of the format.
const MAX_DIMENSIONS: usize = 4;

/// A parsed GGUF file. Its tensors and string arrays stay in the file's memory.
pub struct Gguf {
    file: Bytes,
    version: u32,
    metadata: IndexMap<String, Value>,
    tensors: IndexMap<String, Tensor>,
}

/// A tensor whose extent has been checked.
struct Tensor {
    ty: GgmlType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor of a file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name, unique in the file.
    pub name: &'a str,
    /// The type of its weights.
    pub ty: GgmlType,
    /// Row-major dimensions, the length of a row last: `[rows, columns]` for a matrix. None is
    /// 0. (GGUF has them the other way round.)
    pub shape: &'a [usize],
    /// The weights: `ty.bytes_of(shape.iter().product())` bytes.
    pub data: &'a [u8],
}

impl Gguf {
    /// Maps a file into memory and parses it. Pages of tensors are read on first use.
    ///
    /// The file must not be changed or truncated while it is open.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let map = map(path).map_err(|source| GgufError::Open {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(Bytes::from_owner(map))
    }

    /// Parses a file that is in memory.
    pub fn parse(file: impl Into<Bytes>) -> Result<Self, GgufError> {
        let file = file.into();
        let (version, offset) = version(&file)?;
        let mut cursor = Cursor::new(&file, offset);
        let header = |fault| GgufError::Header { fault };
        // A tensor has at least an empty name, a dimension, a type and an offset; an entry at
        // least an empty key, a type and a byte.
        let n_tensors = cursor.count("tensors", 32).map_err(header)?;
        let n_entries = cursor.count("metadata entries", 13).map_err(header)?;

        let metadata = read_metadata(&mut cursor, n_entries as u64)?;
        let alignment = alignment(&metadata)?;
        let infos = read_tensors(&mut cursor, n_tensors as u64)?;
        let tensors = place_tensors(infos, cursor.offset(), alignment, file.len())?;
        Ok(Self {
            file,
            version,
            metadata,
            tensors,
        })
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The whole file, header and data.
    pub fn bytes(&self) -> &Bytes {
        &self.file
    }

    /// The value of a metadata entry.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Every metadata entry, in the order of the file.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (&**key, value))
    }

    /// The value of a metadata entry that may be missing, but not of another type.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        self.metadata(key)
            .map(|value| T::from_value(key, value))
            .transpose()
    }

    /// The value of a metadata entry that must be there.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| GgufError::MissingKey {
            key: key.to_owned(),
        })
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, tensor) = self.tensors.get_key_value(name)?;
        Some(self.view(name, tensor))
    }

    /// Every tensor, in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.tensors
            .iter()
            .map(|(name, tensor)| self.view(name, tensor))
    }

    fn view<'a>(&'a self, name: &'a str, tensor: &'a Tensor) -> TensorView<'a> {
        TensorView {
            name,
            ty: tensor.ty,
            shape: &tensor.shape,
            data: &self.file[tensor.start..tensor.end],
        }
    }
}

#[allow(unsafe_code)] // The only use: there is no safe way to map a file.
fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is private and read-only, so this process cannot change its bytes.
    // That nobody else changes the file is the documented condition of `Gguf::open`; the
    // parser copies every length and offset it checks, so no check can be undone later.
    unsafe { Mmap::map(&file) }
}

/// The version, and where the rest of the header starts.
fn version(file: &Bytes) -> Result<(u32, usize), GgufError> {
    if !file.starts_with(MAGIC) {
        return Err(GgufError::NotGguf {
            magic: file[..file.len().min(MAGIC.len())].to_vec(),
        });
    }
    let mut cursor = Cursor::new(file, MAGIC.len());
    match cursor.u32().map_err(|fault| GgufError::Header { fault })? {
        version @ 2..=3 => Ok((version, cursor.offset())),
        version if matches!(version.swap_bytes(), 1..=3) => Err(GgufError::BigEndian),
        version => Err(GgufError::Version { version }),
    }
}

fn read_metadata(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<IndexMap<String, Value>, GgufError> {
    let mut metadata = IndexMap::new();
    for index in 0..count {
        let key = cursor
            .name()
            .map_err(|fault| GgufError::Key { index, fault })?
            .to_owned();
        let value = match Value::read(cursor) {
            Ok(value) => value,
            Err(fault) => return Err(GgufError::Metadata { key, fault }),
        };
        if metadata.contains_key(&key) {
            return Err(GgufError::DuplicateKey { key });
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// Of tensor data: a power of two.
pub(crate) fn alignment(metadata: &IndexMap<String, Value>) -> Result<usize, GgufError> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(alignment)) if alignment.is_power_of_two() => Ok(alignment as usize),
        Some(other) => Err(GgufError::Metadata {
            key: ALIGNMENT_KEY.to_owned(),
            fault: Fault::Alignment {
                found: other.describe(),
            },
        }),
    }
}

/// A tensor as its header describes it: the extent is relative to the data, unchecked.
struct TensorInfo {
    ty: GgmlType,
    shape: Vec<usize>,
    offset: u64,
    len: usize,
}

fn read_tensors(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<IndexMap<String, TensorInfo>, GgufError> {
    let mut infos = IndexMap::new();
    for index in 0..count {
        let name = cursor
            .name()
            .map_err(|fault| GgufError::TensorName { index, fault })?
            .to_owned();
        let info = match TensorInfo::read(cursor) {
            Ok(info) => info,
            Err(fault) => return Err(GgufError::Tensor { name, fault }),
        };
        if infos.contains_key(&name) {
            return Err(GgufError::DuplicateTensor { name });
        }
        infos.insert(name, info);
    }
    Ok(infos)
}

impl TensorInfo {
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
        let count = cursor.u32()?;
        if !(1..=MAX_DIMENSIONS as u32).contains(&count) {
            return Err(Fault::Dimensions { count });
        }
        let mut dimensions = Vec::with_capacity(MAX_DIMENSIONS);
        for _ in 0..count {
            dimensions.push(cursor.u64()?);
        }
        let id = cursor.u32()?;
        let ty = GgmlType::from_id(id).ok_or(Fault::UnsupportedType { id })?;
        let offset = cursor.u64()?;
        let shape: Option<Vec<usize>> = dimensions
            .iter()
            .rev()
            .map(|&d| usize::try_from(d).ok())
            .collect();
        let shape = shape.ok_or_else(|| Fault::Shape {
            shape: dimensions.clone(),
        })?;
        let len = data_len(ty, &shape)?;
        Ok(Self {
            ty,
            shape,
            offset,
            len,
        })
    }
}

/// The bytes of a tensor of this type and row-major shape.
pub(crate) fn data_len(ty: GgmlType, shape: &[usize]) -> Result<usize, Fault> {
    let impossible = || Fault::Shape {
        shape: shape.iter().rev().map(|&d| d as u64).collect(),
    };
    if !(1..=MAX_DIMENSIONS).contains(&shape.len()) {
        return Err(Fault::Dimensions {
            count: shape.len() as u32,
        });
    }
    let weights = shape
        .iter()
        .try_fold(1usize, |product, &d| product.checked_mul(d))
        .filter(|&product| product > 0)
        .ok_or_else(impossible)?;
    let columns = shape[shape.len() - 1];
    if !columns.is_multiple_of(ty.block_len()) {
        return Err(Fault::PartialBlock { columns, ty });
    }
    let blocks = weights / ty.block_len();
    blocks.checked_mul(ty.block_bytes()).ok_or_else(impossible)
}

/// Checks where each tensor's data is: aligned, within the file, and its own. So all of them
/// together are no larger than the file.
fn place_tensors(
    infos: IndexMap<String, TensorInfo>,
    header_end: usize,
    alignment: usize,
    file_len: usize,
) -> Result<IndexMap<String, Tensor>, GgufError> {
    let data_start = header_end
        .checked_next_multiple_of(alignment)
        .unwrap_or(usize::MAX);
    let mut tensors = IndexMap::with_capacity(infos.len());
    for (name, info) in infos {
        match info.place(data_start, alignment, file_len) {
            Ok(tensor) => tensors.insert(name, tensor),
            Err(fault) => return Err(GgufError::Tensor { name, fault }),
        };
    }
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_unstable_by_key(|(_, tensor)| tensor.start);
    for pair in order.windows(2) {
        let ((before, first), (name, second)) = (pair[0], pair[1]);
        if first.end > second.start {
            return Err(GgufError::Tensor {
                name: name.clone(),
                fault: Fault::Overlap {
                    other: before.clone(),
                },
            });
        }
    }
    Ok(tensors)
}

impl TensorInfo {
    fn place(self, data_start: usize, alignment: usize, file_len: usize) -> Result<Tensor, Fault> {
        if !self.offset.is_multiple_of(alignment as u64) {
            return Err(Fault::Misaligned {
                offset: self.offset,
                alignment,
            });
        }
        let start = usize::try_from(self.offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset));
        let end = start.and_then(|start| start.checked_add(self.len));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => Ok(Tensor {
                ty: self.ty,
                shape: self.shape,
                start,
                end,
            }),
            _ => Err(Fault::Truncated {
                offset: start.unwrap_or(usize::MAX),
                needed: self.len as u64,
                left: file_len.saturating_sub(start.unwrap_or(file_len)),
            }),
        }
    }
}
