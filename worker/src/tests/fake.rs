//! A backend without a model: the logits of a row depend on its token and its position. Tests
//! hold its steps and spoil them.

use std::sync::{Arc, Condvar, Mutex};

use shoal_core::TokenId;
use shoal_engine::{
    backend::{Backend, BackendError, Batch, NumericsId},
    spec::ModelSpec,
};

pub(crate) const VOCAB: usize = 64;
pub(crate) const CONTEXT: usize = 4096;
pub(crate) const NUMERICS: [u8; 32] = [7; 32];
const PAGES: u32 = 512;

#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    change: Condvar,
}

/// Control over a backend that an engine owns.
#[derive(Clone, Debug, Default)]
pub(crate) struct Control {
    gate: Arc<Gate>,
    panic: Arc<Mutex<bool>>,
}

impl Control {
    /// Steps wait from now on.
    pub(crate) fn hold(&self) {
        *self.gate.closed.lock().unwrap() = true;
    }

    pub(crate) fn release(&self) {
        *self.gate.closed.lock().unwrap() = false;
        self.gate.change.notify_all();
    }

    /// The next step panics.
    pub(crate) fn panic(&self) {
        *self.panic.lock().unwrap() = true;
    }

    fn pass(&self) {
        let closed = self.gate.closed.lock().unwrap();
        drop(
            self.gate
                .change
                .wait_while(closed, |closed| *closed)
                .unwrap(),
        );
        assert!(!*self.panic.lock().unwrap(), "the backend panics, as asked");
    }
}

/// The greedy successor of a token at a position.
pub(crate) fn successor(token: TokenId, position: u32) -> TokenId {
    (token * 7 + position * 3 + 1) % VOCAB as u32
}

/// The greedy answer to a prompt.
pub(crate) fn answer(prompt: &[TokenId], tokens: usize) -> Vec<TokenId> {
    let mut text = prompt.to_vec();
    for _ in 0..tokens {
        let position = text.len() as u32 - 1;
        text.push(successor(text[position as usize], position));
    }
    text.split_off(prompt.len())
}

#[derive(Debug)]
pub(crate) struct FakeBackend {
    spec: ModelSpec,
    control: Control,
}

impl FakeBackend {
    pub(crate) fn new(control: Control) -> Self {
        let spec = ModelSpec::weightless("fake", VOCAB, CONTEXT);
        Self { spec, control }
    }
}

impl Backend for FakeBackend {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn numerics_id(&self) -> NumericsId {
        NumericsId(NUMERICS)
    }

    fn pages(&self) -> u32 {
        PAGES
    }

    fn max_rows(&self) -> usize {
        512
    }

    fn max_logit_rows(&self) -> usize {
        512
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        self.control.pass();
        for (out, &row) in logits.chunks_exact_mut(VOCAB).zip(batch.logit_rows) {
            let (token, position) = (batch.tokens[row as usize], batch.positions[row as usize]);
            out.fill(0.0);
            out[successor(token, position) as usize] = 10.0;
        }
        Ok(())
    }
}
