//! Reading little-endian values from untrusted bytes.

use bytes::Bytes;

use crate::Fault;

/// A place in a file. Nothing is read beyond its end, and nothing is believed that is not
/// there.
pub(crate) struct Cursor<'a> {
    file: &'a Bytes,
    offset: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(file: &'a Bytes, offset: usize) -> Self {
        Self { file, offset }
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    fn left(&self) -> usize {
        self.file.len() - self.offset
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: u64) -> Result<&'a [u8], Fault> {
        let rest = &self.file[self.offset..];
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(bytes) => {
                self.offset += bytes.len();
                Ok(bytes)
            }
            None => Err(Fault::Truncated {
                offset: self.offset,
                needed: len,
                left: rest.len(),
            }),
        }
    }

    /// The next bytes as an array.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of entries of at least `least` bytes each: no more than can follow.
    pub(crate) fn count(&mut self, what: &'static str, least: usize) -> Result<usize, Fault> {
        let count = self.u64()?;
        usize::try_from(count)
            .ok()
            .filter(|&count| count <= self.left() / least)
            .ok_or(Fault::TooMany { what, count })
    }

    /// A string: its length, then its bytes.
    pub(crate) fn str(&mut self) -> Result<&'a str, Fault> {
        let len = self.u64()?;
        let start = self.offset;
        std::str::from_utf8(self.take(len)?).map_err(|error| Fault::NotUtf8 {
            offset: start + error.valid_up_to(),
        })
    }

    /// A string of limited length.
    pub(crate) fn name(&mut self) -> Result<&'a str, Fault> {
        const MOST: u64 = 65_535;
        let name = self.str()?;
        let len = name.len() as u64;
        if len > MOST {
            return Err(Fault::NameTooLong { len, most: MOST });
        }
        Ok(name)
    }

    /// What was read since `start`, sharing the file's memory.
    pub(crate) fn since(&self, start: usize) -> Bytes {
        self.file.slice(start..self.offset)
    }
}
