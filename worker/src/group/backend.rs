//! The backend that an engine has of a group: rank 0, and the means to mend the group.

use std::sync::Arc;

use shoal_collective::CollectiveError;
use shoal_engine::backend::{Backend, BackendError, Batch, NumericsId};
use shoal_engine::cpu::CpuBackend;
use shoal_engine::spec::ModelSpec;
use shoal_gguf::Gguf;

use super::Watch;
use super::leader::Leader;
use super::line::Part;
use crate::config::GroupConfig;
use crate::load::{LoadError, rank_of};

/// See the [module](self).
pub(crate) struct GroupBackend {
    rank: CpuBackend,
    leader: Leader,
    watch: Arc<Watch>,
}

impl GroupBackend {
    /// Starts the other ranks, loads rank 0 meanwhile, and forms the group.
    pub(crate) fn start(
        settings: &GroupConfig,
        part: Part,
        watch: Arc<Watch>,
        gguf: &Gguf,
        spec: ModelSpec,
    ) -> Result<Self, LoadError> {
        let leader = Leader::start(settings, part.clone(), Arc::clone(&watch))?;
        let mut group = Self {
            rank: rank_of(gguf, spec, &part)?,
            leader,
            watch,
        };
        group.leader.expect(group.rank.numerics_id().0);
        group.form()?;
        Ok(group)
    }

    fn form(&mut self) -> Result<(), LoadError> {
        let seat = self.leader.form(self.rank.frame_words())?;
        Ok(self.rank.join(Box::new(seat))?)
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

    fn recover(&mut self) -> Result<(), BackendError> {
        // The ranks that live see that rank 0 has left, and wait to be called.
        self.rank.leave();
        match self.form() {
            Ok(()) => Ok(()),
            Err(LoadError::Backend(error)) => Err(error),
            Err(error) => Err(BackendError::Device(Box::new(error))),
        }
    }

    fn step(&mut self, batch: &Batch<'_>, logits: &mut [f32]) -> Result<(), BackendError> {
        let result = self.rank.step(batch, logits);
        if let Err(BackendError::Group(error)) = &result {
            self.watch.whole.send_replace(false);
            if let CollectiveError::PeerLost { rank } | CollectiveError::Timeout { rank, .. } =
                error
            {
                self.leader.end(*rank);
            }
        }
        result
    }
}
