//! The backend that an engine has of a group: rank 0, and the means to mend the group.

use std::sync::Arc;

use shoal_collective::CollectiveError;
use shoal_engine::backend::{Backend, BackendError, Batch, NumericsId};
use shoal_engine::cpu::CpuBackend;
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;

use super::line::Part;
use super::price::Price;
use super::{Formed, Lead, Watch, leader, remote};
use crate::config::{GroupConfig, Others};
use crate::load::{LoadError, rank_of};

/// See the [module](self).
pub(crate) struct GroupBackend {
    rank: CpuBackend,
    leader: Box<dyn Lead>,
    price: Price,
    watch: Arc<Watch>,
}

impl GroupBackend {
    /// Starts or awaits the other ranks, loads rank 0 meanwhile, and forms the group.
    pub(crate) fn start(
        settings: &GroupConfig,
        part: Part,
        price: Price,
        watch: Arc<Watch>,
        gguf: &Gguf,
        spec: ModelSpec,
    ) -> Result<Self, LoadError> {
        let (patience, seen) = (settings.patience, Arc::clone(&watch));
        let leader: Box<dyn Lead> = match &settings.others {
            Others::Local(command) => {
                // Before processes are started for it.
                price.weigh(None);
                Box::new(leader::Leader::start(
                    command,
                    patience,
                    part.clone(),
                    seen,
                )?)
            }
            Others::Remote(remote) => {
                Box::new(remote::Leader::start(remote, patience, part.clone(), seen)?)
            }
        };
        let mut group = Self {
            rank: rank_of(gguf, spec, &part)?,
            leader,
            price,
            watch,
        };
        group.leader.expect(group.rank.numerics_id().0);
        while !group.form()? {}
        Ok(group)
    }

    fn form(&mut self) -> Result<bool, LoadError> {
        let Some(Formed { seat, pace }) = self.leader.form(self.rank.frame_words())? else {
            return Ok(false);
        };
        if pace.is_some() {
            self.price.weigh(pace);
        }
        self.rank.join(seat)?;
        self.watch.whole.send_replace(true);
        Ok(true)
    }
}

impl Backend for GroupBackend {
    fn name(&self) -> &'static str {
        self.rank.name()
    }

    fn spec(&self) -> &ModelSpec {
        self.rank.spec()
    }

    fn numerics_id(&self) -> NumericsId {
        self.rank.numerics_id()
    }

    fn pages(&self) -> u32 {
        self.rank.pages()
    }

    fn max_rows(&self) -> usize {
        self.rank.max_rows()
    }

    fn max_logit_rows(&self) -> usize {
        self.rank.max_logit_rows()
    }

    fn ranks(&self) -> usize {
        self.rank.ranks()
    }

    fn intact(&mut self) -> Result<(), BackendError> {
        match self.leader.dead() {
            Some(rank) => {
                self.watch.whole.send_replace(false);
                Err(CollectiveError::PeerLost { rank }.into())
            }
            None => Ok(()),
        }
    }

    fn recover(&mut self) -> Result<bool, BackendError> {
        // The ranks that live see that rank 0 has left, and wait to be called.
        self.rank.leave();
        match self.form() {
            Ok(whole) => Ok(whole),
            Err(LoadError::Backend(error)) => Err(error),
            Err(error) => Err(BackendError::Device(Box::new(error))),
        }
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        let result = self.rank.step(batch, logits);
        if let Err(BackendError::Group(error)) = &result {
            self.watch.whole.send_replace(false);
            if let Some(rank) = error.blamed() {
                self.leader.end(rank);
            }
        }
        result
    }

    fn maxima(&self) -> &[f32] {
        self.rank.maxima()
    }
}
