//! The memory that the ranks of a group share.
//!
//! A preamble, a header for every rank, then two slots for every rank, in which it writes its
//! frames by turns. Memory of the system's begins as zeros, and every field is valid as such.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{CollectiveError, MAX_RANKS};

/// Says that the memory is a segment of this layout.
const MAGIC: u64 = u64::from_le_bytes(*b"shoaltp1");
/// Bytes between what different ranks write (two cache lines, for the adjacent-line
/// prefetcher).
const LINE: usize = 128;
/// A slot is whole pages.
const PAGE_WORDS: usize = 1024;

/// What never changes in a segment.
#[repr(C)]
struct Preamble {
    magic: AtomicU64,
    epoch: AtomicU64,
    world: AtomicU64,
    /// Words of a slot.
    words: AtomicU64,
}

/// What a rank tells the others.
#[repr(C)]
pub(super) struct Header {
    /// Calls that it has begun: everything before is done, and its frame of this one is there.
    pub(super) number: AtomicU32,
    /// Ranks that sleep on the number.
    pub(super) sleepers: AtomicU32,
    /// Of the formation that it is in.
    pub(super) epoch: AtomicU64,
    /// 0 until it is there.
    pub(super) pid: AtomicU32,
    /// Not 0: it will make no further call, and the rank before this number is why.
    pub(super) left: AtomicU32,
    /// Words of the frame in each of its slots.
    pub(super) lens: [AtomicU32; 2],
}

const _: () = assert!(size_of::<Preamble>() <= LINE && size_of::<Header>() <= LINE);

/// A mapped segment.
pub struct Segment {
    start: NonNull<u8>,
    bytes: usize,
    world: usize,
    words: usize,
}

// SAFETY: a `Segment` owns its mapping. What is in it is atomic, but for the slots, whose
// accessors' contract keeps ranks apart.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

fn slots_at(world: usize) -> usize {
    ((1 + world) * LINE).next_multiple_of(PAGE_WORDS * 4)
}

/// Of a segment of `world` ranks with two slots of `words` words each; `None` where it has no
/// address.
fn bytes(world: usize, words: usize) -> Option<usize> {
    words.checked_mul(8 * world)?.checked_add(slots_at(world))
}

impl Segment {
    /// New memory for `world` ranks whose frames have up to `words` words, and the file by which
    /// other processes [open](Self::open) it. Pages are taken from the system when they are
    /// first written.
    ///
    /// # Errors
    /// When the system refuses, or there are more than [`MAX_RANKS`].
    pub fn create(world: usize, epoch: u64, words: usize) -> io::Result<(Self, OwnedFd)> {
        if !(1..=MAX_RANKS).contains(&world) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let words = words.max(1).next_multiple_of(PAGE_WORDS);
        let bytes = bytes(world, words).ok_or(io::ErrorKind::OutOfMemory)?;
        let file = memfd_create(
            "shoal-group",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        ftruncate(&file, bytes as u64)?;
        // Nobody can take mapped memory away.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        let segment = Self::map(&file, bytes, world, words)?;
        let preamble = segment.preamble();
        preamble.epoch.store(epoch, Ordering::Relaxed);
        preamble.world.store(world as u64, Ordering::Relaxed);
        preamble.words.store(words as u64, Ordering::Relaxed);
        preamble.magic.store(MAGIC, Ordering::Release);
        Ok((segment, file))
    }

    /// The segment of another process.
    ///
    /// # Errors
    /// When it is none.
    pub fn open(file: impl AsFd) -> Result<Self, CollectiveError> {
        // Memory that its maker can still take away would end this process when it is touched.
        if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(CollectiveError::Segment);
        }
        let size = fstat(&file).map_err(io::Error::from)?.st_size as usize;
        if size < slots_at(1) {
            return Err(CollectiveError::Segment);
        }
        let mut segment = Self::map(&file, size, 0, 0)?;
        let preamble = segment.preamble();
        let magic = preamble.magic.load(Ordering::Acquire);
        let world = preamble.world.load(Ordering::Relaxed) as usize;
        let words = preamble.words.load(Ordering::Relaxed) as usize;
        let fits = (1..=MAX_RANKS).contains(&world) && bytes(world, words) == Some(size);
        if magic != MAGIC || !fits {
            return Err(CollectiveError::Segment);
        }
        (segment.world, segment.words) = (world, words);
        Ok(segment)
    }

    fn map(file: impl AsFd, bytes: usize, world: usize, words: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice. The file cannot shrink
        // under it: `create` has sealed it, and `open` has seen the seal.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        Ok(Self {
            start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            bytes,
            world,
            words,
        })
    }

    fn preamble(&self) -> &Preamble {
        // SAFETY: the mapping begins with it, is aligned to pages, and any bytes are valid.
        unsafe { self.start.cast().as_ref() }
    }

    /// The formation that it was made for.
    pub fn epoch(&self) -> u64 {
        self.preamble().epoch.load(Ordering::Relaxed)
    }

    /// Ranks that it has room for.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Most words of a frame.
    pub(super) fn words(&self) -> usize {
        self.words
    }

    pub(super) fn header(&self, rank: usize) -> &Header {
        assert!(rank < self.world);
        // SAFETY: it lies within the mapping, at a multiple of a line, and any bytes are valid.
        unsafe { self.start.add((1 + rank) * LINE).cast().as_ref() }
    }

    fn slot(&self, rank: usize, slot: usize, len: usize) -> *mut u32 {
        assert!(rank < self.world && slot < 2 && len <= self.words);
        let at = slots_at(self.world) + (2 * rank + slot) * self.words * 4;
        self.start.as_ptr().wrapping_add(at).cast()
    }

    /// The first `len` words of a slot.
    ///
    /// # Safety
    /// Nobody writes them meanwhile.
    pub(super) unsafe fn frame(&self, rank: usize, slot: usize, len: usize) -> &[u32] {
        // SAFETY: within the mapping and aligned; races are the caller's contract.
        unsafe { std::slice::from_raw_parts(self.slot(rank, slot, len), len) }
    }

    /// The first `len` words of a slot as floats.
    ///
    /// # Safety
    /// As [`frame`](Self::frame).
    pub(super) unsafe fn floats(&self, rank: usize, slot: usize, len: usize) -> &[f32] {
        // SAFETY: as in `frame`; any word is a float.
        unsafe { std::slice::from_raw_parts(self.slot(rank, slot, len).cast(), len) }
    }

    /// The same to write.
    ///
    /// # Safety
    /// Nobody else reads or writes them meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn floats_mut(&self, rank: usize, slot: usize, len: usize) -> &mut [f32] {
        // SAFETY: as in `frame`; any word is a float.
        unsafe { std::slice::from_raw_parts_mut(self.slot(rank, slot, len).cast(), len) }
    }

    /// Copies words to a slot.
    ///
    /// # Safety
    /// As [`floats_mut`](Self::floats_mut).
    pub(super) unsafe fn write(&self, rank: usize, slot: usize, words: &[u32]) {
        let to = self.slot(rank, slot, words.len());
        // SAFETY: within the mapping and aligned; races are the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), to, words.len()) };
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the range is the whole of this mapping, and nothing borrows it.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
