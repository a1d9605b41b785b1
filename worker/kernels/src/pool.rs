//! A persistent pool for fork–join phases of a few microseconds.
//!
//! One thread drives: it calls [`Pool::phase`] again and again, and works on each phase
//! itself. Between the phases of a step the pool's threads spin, so a phase costs two cache
//! line transfers; after 50 µs without one they sleep on a futex, because on a small machine
//! the network threads need the cores too. Items are shared out dynamically: a thread that
//! the system takes away delays its current item only.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// Keeps counters that different threads write on different cache lines (two, for the
/// adjacent-line prefetcher).
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

/// What a phase runs, with its lifetime erased.
#[derive(Clone, Copy)]
struct Job {
    /// Takes the number of the thread and the item.
    item: *const (dyn Fn(usize, usize) + Sync),
    items: usize,
}

fn nothing(_: usize, _: usize) {}

struct Shared {
    /// Written by the driver before `round` rises, read by the threads after.
    job: UnsafeCell<Job>,
    /// Rises by one with every phase.
    round: Line<AtomicU32>,
    /// Threads that have finished the current phase.
    finished: Line<AtomicU32>,
    /// The next item of the current phase.
    next: Line<AtomicUsize>,
    /// Threads asleep on `round` or `finished`.
    sleeping: Line<AtomicU32>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `job` is written only while no thread is between the rise of `round` and its
// arrival in `finished`; everything else is atomic. The pointee of the job is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    /// Waits until `done` holds for `word`: spins, then sleeps.
    fn wait(&self, word: &AtomicU32, done: impl Fn(u32) -> bool) {
        let mut started = None;
        loop {
            for _ in 0..64 {
                if done(word.load(Ordering::Acquire)) {
                    return;
                }
                std::hint::spin_loop();
            }
            if started.get_or_insert_with(Instant::now).elapsed() > SPIN {
                break;
            }
        }
        self.sleeping.0.fetch_add(1, Ordering::SeqCst);
        loop {
            let seen = word.load(Ordering::SeqCst);
            if done(seen) {
                break;
            }
            atomic_wait::wait(word, seen);
        }
        self.sleeping.0.fetch_sub(1, Ordering::SeqCst);
    }

    /// Raises `word` and wakes whoever sleeps on it.
    fn raise(&self, word: &AtomicU32) {
        word.fetch_add(1, Ordering::SeqCst);
        if self.sleeping.0.load(Ordering::SeqCst) > 0 {
            atomic_wait::wake_all(word);
        }
    }

    /// Runs items of the current phase until none is left.
    fn work(&self, thread: usize, job: Job) {
        // SAFETY: the driver keeps the closure alive until every thread has finished.
        let item = unsafe { &*job.item };
        loop {
            let i = self.next.0.fetch_add(1, Ordering::Relaxed);
            if i >= job.items {
                return;
            }
            item(thread, i);
        }
    }

    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.wait(&self.round.0, |round| round != seen);
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: the driver wrote it before `round` rose and leaves it until we finish.
            let job = unsafe { *self.job.get() };
            if catch_unwind(AssertUnwindSafe(|| self.work(thread, job))).is_err() {
                self.panicked.store(true, Ordering::Release);
            }
            self.raise(&self.finished.0);
        }
    }
}

/// Threads that work on one phase at a time.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads (at least one); whoever calls [`phase`](Self::phase) is the
    /// first.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(Job {
                item: &nothing,
                items: 0,
            }),
            round: Line::default(),
            finished: Line::default(),
            next: Line::default(),
            sleeping: Line::default(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
        };
        for index in 1..threads.max(1) {
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
    /// When an item panics, after the others have ended.
    pub fn phase(&mut self, items: usize, item: impl Fn(usize) + Sync) {
        self.run(items, |_, i| item(i));
    }

    /// [`phase`](Self::phase) with an element of `slots` for every thread, which its items
    /// have to themselves one after the other.
    ///
    /// # Panics
    /// As `phase`, and when there are fewer slots than threads.
    pub fn phase_with<T: Send>(
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
        let shared = &*self.shared;
        let others = self.threads.len() as u32;
        if others == 0 || items <= 1 {
            (0..items).for_each(|i| item(0, i));
            return;
        }
        let item: *const (dyn Fn(usize, usize) + Sync + '_) = &item;
        // SAFETY: only the lifetime changes; this function waits for every thread to finish
        // before it returns or unwinds, so none uses the closure after its end.
        let item: *const (dyn Fn(usize, usize) + Sync) = unsafe { std::mem::transmute(item) };
        let job = Job { item, items };
        // SAFETY: every thread has finished the phase before, so none reads the cell.
        unsafe { *shared.job.get() = job };
        shared.next.0.store(0, Ordering::Relaxed);
        shared.finished.0.store(0, Ordering::Relaxed);
        shared.raise(&shared.round.0);
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(0, job)));
        shared.wait(&shared.finished.0, |finished| finished == others);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(
            !shared.panicked.swap(false, Ordering::AcqRel),
            "an item panicked on a compute thread"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.raise(&self.shared.round.0);
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
            while pool.shared.sleeping.0.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            let ran = AtomicUsize::new(0);
            pool.phase(3, |_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), 3);
        }
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
