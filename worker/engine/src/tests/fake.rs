//! A backend without a model: the logits of a row are a hash of what the KV pool holds for its
//! sequence, as its page table says. A wrong page, position or role changes the tokens.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use shoal_core::{PAGE_TOKENS, Role};

use crate::backend::{Backend, BackendError, Batch, NumericsId};
use crate::spec::ModelSpec;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    token: u32,
    position: u32,
    role: Role,
}

/// What a step does beside computing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Retry,
    /// The pages are lost until it recovers.
    Lost,
    Fatal,
    Panic,
    /// The logits of the step's first logit row are NaN.
    Nan,
}

/// What tests see of a backend that an engine owns.
#[derive(Clone, Debug, Default)]
pub(crate) struct Probe {
    /// Faults of the next steps.
    pub(crate) faults: Arc<Mutex<VecDeque<Fault>>>,
    pub(crate) most_rows: Arc<AtomicUsize>,
    /// Prompt rows computed, of all steps.
    pub(crate) prompt_rows: Arc<AtomicUsize>,
    pub(crate) steps: Arc<AtomicUsize>,
    /// The pages are lost.
    pub(crate) lost: Arc<AtomicBool>,
    /// It cannot recover yet.
    pub(crate) away: Arc<AtomicBool>,
    pub(crate) recoveries: Arc<AtomicUsize>,
    /// Milliseconds that a row takes.
    pub(crate) row_time: Arc<AtomicU64>,
    /// Milliseconds since the start.
    pub(crate) clock: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(crate) struct FakeBackend {
    spec: ModelSpec,
    pool: Vec<Option<Cell>>,
    max_rows: usize,
    max_logit_rows: usize,
    probe: Probe,
}

pub(crate) fn spec(vocab: usize, context: usize) -> ModelSpec {
    ModelSpec::weightless("fake", vocab, context)
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl FakeBackend {
    pub(crate) fn new(pages: u32, spec: ModelSpec) -> Self {
        Self {
            spec,
            pool: vec![None; pages as usize * PAGE_TOKENS],
            max_rows: 4096,
            max_logit_rows: 256,
            probe: Probe::default(),
        }
    }

    pub(crate) fn with_rows(mut self, max_rows: usize, max_logit_rows: usize) -> Self {
        self.max_rows = max_rows;
        self.max_logit_rows = max_logit_rows;
        self
    }

    pub(crate) fn probe(&self) -> Probe {
        self.probe.clone()
    }

    /// Writes every row's cell, checking the batch against its contract.
    fn store(&mut self, batch: &Batch<'_>) {
        let mut row = 0;
        let mut written = std::collections::HashSet::new();
        for segment in batch.segments {
            assert_eq!(segment.rows.start, row, "segments cover every row once");
            assert!(!segment.rows.is_empty());
            row = segment.rows.end;
            let pages = &batch.page_table[segment.pages.start as usize..segment.pages.end as usize];
            let first = batch.positions[segment.rows.start as usize];
            for (i, r) in segment.rows.clone().enumerate() {
                let position = batch.positions[r as usize];
                assert_eq!(position, first + i as u32, "positions are consecutive");
                let slot = slot(pages, position);
                assert!(written.insert(slot), "two rows in one slot");
                self.pool[slot] = Some(Cell {
                    token: batch.tokens[r as usize],
                    position,
                    role: segment.role,
                });
                if segment.role == Role::Prompt {
                    self.probe.prompt_rows.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        assert_eq!(row as usize, batch.tokens.len());
        assert!(batch.logit_rows.windows(2).all(|w| w[0] < w[1]));
    }

    /// The hash of everything a row attends to.
    fn context(&self, batch: &Batch<'_>, row: u32) -> u64 {
        let segment = batch
            .segments
            .iter()
            .find(|segment| segment.rows.contains(&row))
            .expect("the row is in a segment");
        let pages = &batch.page_table[segment.pages.start as usize..segment.pages.end as usize];
        (0..=batch.positions[row as usize]).fold(7, |hash, position| {
            let cell = self.pool[slot(pages, position)].expect("the slot was written");
            assert_eq!(cell.position, position, "a page of another place");
            let role = u64::from(cell.role == Role::Output);
            mix(hash ^ (u64::from(cell.token) << 1 | role)).wrapping_add(1)
        })
    }
}

fn slot(pages: &[u32], position: u32) -> usize {
    let position = position as usize;
    pages[position / PAGE_TOKENS] as usize * PAGE_TOKENS + position % PAGE_TOKENS
}

impl Backend for FakeBackend {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn numerics_id(&self) -> NumericsId {
        NumericsId([7; 32])
    }

    fn pages(&self) -> u32 {
        (self.pool.len() / PAGE_TOKENS) as u32
    }

    fn max_rows(&self) -> usize {
        self.max_rows
    }

    fn max_logit_rows(&self) -> usize {
        self.max_logit_rows
    }

    fn intact(&mut self) -> Result<(), BackendError> {
        match self.probe.lost.load(Ordering::Relaxed) {
            true => Err(BackendError::NoGroup),
            false => Ok(()),
        }
    }

    fn recover(&mut self) -> Result<bool, BackendError> {
        if self.probe.away.load(Ordering::Relaxed) {
            return Ok(false);
        }
        self.pool.fill(None);
        self.probe.recoveries.fetch_add(1, Ordering::Relaxed);
        self.probe.lost.store(false, Ordering::Relaxed);
        Ok(true)
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        assert!(!batch.tokens.is_empty() && batch.tokens.len() <= self.max_rows);
        assert!(batch.logit_rows.len() <= self.max_logit_rows);
        assert!(batch.outputs().is_some(), "prompts before outputs");
        assert_eq!(logits.len(), batch.logit_rows.len() * self.spec.vocab);
        assert!(
            !self.probe.lost.load(Ordering::Relaxed),
            "a step on lost pages"
        );
        self.probe.steps.fetch_add(1, Ordering::Relaxed);
        let rows = batch.tokens.len();
        self.probe.most_rows.fetch_max(rows, Ordering::Relaxed);
        let time = rows as u64 * self.probe.row_time.load(Ordering::Relaxed);
        self.probe.clock.fetch_add(time, Ordering::Relaxed);
        let fault = self.probe.faults.lock().unwrap().pop_front();
        match fault {
            Some(Fault::Retry) => return Err(BackendError::Device("lost".into())),
            Some(Fault::Lost) => {
                self.probe.lost.store(true, Ordering::Relaxed);
                return Err(BackendError::NoGroup);
            }
            Some(Fault::Fatal) => {
                return Err(BackendError::BatchTooLarge { rows: 1, max: 0 });
            }
            Some(Fault::Panic) => panic!("the backend panics, as asked"),
            _ => {}
        }
        self.store(batch);
        let rows = logits.chunks_exact_mut(self.spec.vocab);
        for (out, &row) in rows.zip(batch.logit_rows) {
            let context = self.context(batch, row);
            for (token, logit) in out.iter_mut().enumerate() {
                let bits = mix(context ^ mix(token as u64 + 1)) >> 40;
                *logit = bits as f32 / (1u32 << 21) as f32 - 4.0;
            }
        }
        if fault == Some(Fault::Nan) {
            logits[self.spec.vocab / 2] = f32::NAN;
        }
        Ok(())
    }
}
