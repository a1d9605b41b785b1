//! A persistent pool for fork–join phases of a few microseconds.
//!
//! One thread drives: it calls [`Pool::phase`] again and again, and works on each phase
//! itself. Between the phases of a step the pool's threads spin, so a phase costs a few cache
//! line transfers; after 50 µs without one they sleep on a futex, because on a small machine
//! the network threads need the cores too. Every thread begins with a stretch of items of its
//! own, which lie side by side in memory as a rule and cost no transfer to take, and then takes
//! from the ends of the others' stretches. A phase waits for its items, not for its threads: one
//! that the system lets not run takes no part, and one that it takes away delays its current
//! item only.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// Keeps words that different threads write on different cache lines (two, for the
/// adjacent-line prefetcher).
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

/// A number to wait for.
#[derive(Default)]
struct Signal {
    word: AtomicU32,
    /// How many sleep on the word, or are about to. Only they themselves change it: whoever raises
    /// the number may be held up in between, and would speak for somebody who came later.
    sleepers: AtomicU32,
}

impl Signal {
    /// Waits until `done` holds for the number: spins, then sleeps.
    fn wait(&self, done: impl Fn(u32) -> bool) {
        let mut started: Option<Instant> = None;
        loop {
            for _ in 0..64 {
                if done(self.word.load(Ordering::Acquire)) {
                    return;
                }
                std::hint::spin_loop();
            }
            match started {
                None => started = Some(Instant::now()),
                Some(started) if started.elapsed() > SPIN => break,
                // Whoever waits for this core may be whom this thread waits for.
                Some(_) => std::thread::yield_now(),
            }
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let seen = self.word.load(Ordering::SeqCst);
            if done(seen) {
                break;
            }
            atomic_wait::wait(&self.word, seen);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Adds to the number and wakes whoever sleeps on it.
    fn raise(&self, by: u32) {
        self.word.fetch_add(by, Ordering::SeqCst);
        self.wake();
    }

    /// The second half of [`raise`](Self::raise).
    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            atomic_wait::wake_all(&self.word);
        }
    }
}

/// What a phase runs, with its lifetime erased. Takes the number of the thread and the item.
type Job = *const (dyn Fn(usize, usize) + Sync);

fn nothing(_: usize, _: usize) {}

/// A stretch of items that nobody has yet, on one cache line with what is run for each.
struct Stretch {
    /// The first item in the lower half, their end in the upper.
    items: AtomicU64,
    /// Written by the driver between phases; read by who has an item of the current one.
    job: UnsafeCell<Job>,
}

impl Default for Stretch {
    fn default() -> Self {
        Self {
            items: AtomicU64::default(),
            job: UnsafeCell::new(&nothing),
        }
    }
}

impl Stretch {
    /// # Safety
    /// Every item of this stretch that was taken before has ended.
    unsafe fn set(&self, items: Range<u32>, job: Job) {
        // SAFETY: nobody has an item of the stretch, nor gets one before the store below.
        unsafe { *self.job.get() = job };
        let word = u64::from(items.end) << 32 | u64::from(items.start);
        self.items.store(word, Ordering::Release);
    }

    /// Takes an item, the first or the last, and what to run for it. It is one of the current phase,
    /// whichever was when the caller came: the stretches of a phase are empty before those of the
    /// next are set.
    fn take(&self, first: bool) -> Option<(u32, Job)> {
        let mut seen = self.items.load(Ordering::Acquire);
        loop {
            let (start, end) = (seen as u32, (seen >> 32) as u32);
            if start == end {
                return None;
            }
            let (item, rest) = match first {
                true => (start, seen + 1),
                false => (end - 1, seen - (1 << 32)),
            };
            let (got, failed) = (Ordering::AcqRel, Ordering::Acquire);
            match self.items.compare_exchange_weak(seen, rest, got, failed) {
                // SAFETY: this thread has an item, so the driver leaves the cell.
                Ok(_) => return Some((item, unsafe { *self.job.get() })),
                Err(now) => seen = now,
            }
        }
    }
}

struct Shared {
    /// Rises by one with every phase.
    round: Line<Signal>,
    /// Of every thread.
    open: Box<[Line<Stretch>]>,
    /// Items that have ended, of all phases.
    ended: Line<Signal>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `job` is read only by a thread that has taken an item and not yet counted it as
// ended, and written only while there is none; everything else is atomic. The pointee of the
// job is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    /// Takes an item of the current phase: the next of the thread's own, or somebody's last.
    fn take(&self, thread: usize) -> Option<(u32, Job)> {
        let threads = self.open.len();
        let mut others = (1..threads).map(|next| &self.open[(thread + next) % threads].0);
        let own = self.open[thread].0.take(true);
        own.or_else(|| others.find_map(|other| other.take(false)))
    }

    /// Runs items of the current phase until none is left; what the last panic said.
    fn work(&self, thread: usize) -> Option<Box<dyn Any + Send>> {
        let (mut panic, mut count) = (None, 0);
        while let Some((item, job)) = self.take(thread) {
            // SAFETY: this thread has an item, so the driver leaves the job's closure.
            let job = unsafe { &*job };
            let run = AssertUnwindSafe(|| job(thread, item as usize));
            if let Err(cause) = catch_unwind(run) {
                panic = Some(cause);
            }
            count += 1;
        }
        if panic.is_some() {
            self.panicked.store(true, Ordering::Release);
        }
        if count > 0 {
            self.ended.0.raise(count);
        }
        panic
    }

    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.round.0.wait(|round| round != seen);
            seen = self.round.0.word.load(Ordering::Acquire);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            self.work(thread);
        }
    }
}

/// Threads that work on one phase at a time.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Items of all phases before the next.
    items: u32,
}

impl Pool {
    /// A pool of `threads` threads (at least one); whoever calls [`phase`](Self::phase) is the
    /// first.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            round: Line::default(),
            open: (0..threads).map(|_| Line::default()).collect(),
            ended: Line::default(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
            items: 0,
        };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("compute-{index}"))
                .spawn(move || shared.serve(index))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Number of threads, the driver's included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `item` for every number below `items`, each once on some thread, and returns when
    /// all have run; what they wrote is visible to the caller.
    ///
    /// # Panics
    /// When an item panics, after the others have ended, or when there are more than 2³² - 1.
    pub(crate) fn phase(&mut self, items: usize, item: impl Fn(usize) + Sync) {
        self.run(items, |_, i| item(i));
    }

    /// [`phase`](Self::phase) with an element of `slots` for every thread, which its items
    /// have to themselves one after the other.
    ///
    /// # Panics
    /// As `phase`, and when there are fewer slots than threads.
    pub(crate) fn phase_with<T: Send>(
        &mut self,
        slots: &mut [T],
        items: usize,
        item: impl Fn(&mut T, usize) + Sync,
    ) {
        assert!(slots.len() >= self.threads());
        let slots = Scatter::new(slots);
        self.run(items, |thread, i| {
            // SAFETY: a thread runs one item at a time, and its slot is no other's.
            let slot = unsafe { slots.part(thread, 1) };
            item(&mut slot[0], i);
        });
    }

    fn run(&mut self, items: usize, item: impl Fn(usize, usize) + Sync) {
        if self.threads.is_empty() || items <= 1 {
            (0..items).for_each(|i| item(0, i));
            return;
        }
        assert!(u32::try_from(items).is_ok());
        let (shared, threads, items) = (&*self.shared, self.threads(), items as u32);
        let item: *const (dyn Fn(usize, usize) + Sync + '_) = &item;
        // SAFETY: only the lifetime changes; this function waits for every item to end before
        // it returns or unwinds, and a thread uses the closure for an item alone.
        let item: *const (dyn Fn(usize, usize) + Sync) = unsafe { std::mem::transmute(item) };
        let start = |thread: usize| (u64::from(items) * thread as u64 / threads as u64) as u32;
        for (thread, stretch) in shared.open.iter().enumerate() {
            // SAFETY: every item of the phase before has ended, this stretch's among them.
            unsafe { stretch.0.set(start(thread)..start(thread + 1), item) };
        }
        self.items = self.items.wrapping_add(items);
        shared.round.0.raise(1);
        let own = shared.work(0);
        shared.ended.0.wait(|ended| ended == self.items);
        let panicked = shared.panicked.swap(false, Ordering::AcqRel);
        if let Some(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "an item panicked on a compute thread");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.round.0.raise(1);
        for thread in self.threads.drain(..) {
            // The threads catch the panics of their items; there is nothing to learn here.
            let _ = thread.join();
        }
    }
}

/// A mutable slice whose elements the items of a phase write, each its own.
pub(crate) struct Scatter<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: it is a pointer into a `&mut [T]`; its accessors' contract keeps threads apart.
unsafe impl<T: Send> Sync for Scatter<T> {}

impl<T> Scatter<T> {
    /// Borrows the slice in spirit: the caller keeps `slice` untouched while it uses this.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// The place of an element, or the end.
    pub(crate) fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.len);
        self.start.wrapping_add(index)
    }

    /// The elements from `start` on.
    ///
    /// # Safety
    /// No two threads hold overlapping parts at the same time, and the slice outlives them.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: inside the slice; disjointness is the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_item_runs_once_and_is_seen() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads).unwrap();
            let mut cells = vec![0usize; 37];
            for round in 1..=1000 {
                let items = round % 38;
                let scatter = Scatter::new(&mut cells);
                // SAFETY: item i touches cell i only.
                pool.phase(items, |i| unsafe { scatter.part(i, 1)[0] += 1 });
            }
            for (i, &count) in cells.iter().enumerate() {
                let expected = (1..=1000).filter(|round| round % 38 > i).count();
                assert_eq!(count, expected);
            }
        }
    }

    #[test]
    fn threads_have_slots_of_their_own() {
        for threads in [1, 2, 3] {
            let mut pool = Pool::new(threads).unwrap();
            let mut counts = vec![0; threads];
            for _ in 0..100 {
                pool.phase_with(&mut counts, 50, |count, _| *count += 1);
            }
            assert_eq!(counts.iter().sum::<usize>(), 5000);
        }
    }

    #[test]
    fn sleeping_threads_wake() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..3 {
            while pool.shared.round.0.sleepers.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            let ran = AtomicUsize::new(0);
            pool.phase(3, |_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), 3);
        }
    }

    /// A driver that is held up between its two halves wakes for a round that the thread has
    /// already done: that must not hide the thread's next sleep from the next round.
    #[test]
    fn a_late_wake_takes_no_sleeper_away() {
        let signal = Signal::default();
        std::thread::scope(|threads| {
            signal.word.fetch_add(1, Ordering::SeqCst);
            let sleeper = threads.spawn(|| signal.wait(|number| number == 2));
            while signal.sleepers.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            // Late, for the number 1, and perhaps before the thread has got to its sleep.
            signal.wake();
            assert_eq!(signal.sleepers.load(Ordering::SeqCst), 1);
            signal.raise(1);
            sleeper.join().unwrap();
        });
        assert_eq!(signal.sleepers.into_inner(), 0);
    }

    #[test]
    fn a_panic_reaches_the_driver_and_the_pool_lives_on() {
        let mut pool = Pool::new(3).unwrap();
        for guilty in 0..7 {
            let phase = catch_unwind(AssertUnwindSafe(|| {
                pool.phase(7, |i| assert_ne!(i, guilty, "on purpose"));
            }));
            assert!(phase.is_err());
            let ran = AtomicUsize::new(0);
            pool.phase(7, |_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), 7);
        }
    }
}
