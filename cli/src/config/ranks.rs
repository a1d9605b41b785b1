//! What `[worker]` says of ranks that share a model.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use shoal_fabric::telemetry::LogConfig;
use shoal_worker::{
    GroupConfig, Others, Payload, RankCommand, RankConfig, RemoteConfig, parse_isa, parse_payload,
};

use super::{ConfigError, Section, WorkerSettings, log};

/// How long a rank is waited for, unless set.
const PATIENCE: Duration = Duration::from_secs(2);

impl WorkerSettings {
    /// The group of a worker with several ranks; those of this machine log as `log` says.
    pub(super) fn group_config(&self, log: &LogConfig) -> Result<Option<GroupConfig>, ConfigError> {
        let ranks = self.tensor_parallel.map_or(1, NonZeroUsize::get);
        let between = [
            self.rank_listen.is_some(),
            self.rank_secret.is_some(),
            self.rank_payload.is_some(),
        ];
        if self.rank.is_some() {
            return Err(incomplete("join with rank"));
        }
        if ranks == 1 && between.contains(&true) {
            return Err(incomplete("tensor_parallel of at least 2 with rank_listen"));
        }
        if ranks == 1 {
            return Ok(None);
        }
        let others = match (self.rank_listen, &self.rank_secret) {
            (Some(listen), Some(secret)) => Others::Remote(RemoteConfig {
                listen,
                secret: secret.clone(),
                payload: match &self.rank_payload {
                    Some(name) => parse_payload(name)?,
                    None => Payload::Bf16,
                },
            }),
            (None, None) if self.rank_payload.is_none() => Others::Local(RankCommand {
                program: std::env::current_exe().map_err(ConfigError::Program)?,
                arguments: log::arguments("rank", log),
            }),
            _ => {
                return Err(incomplete(
                    "rank_listen and rank_secret together, and both for rank_payload",
                ));
            }
        };
        Ok(Some(GroupConfig {
            ranks,
            others,
            patience: self.rank_timeout.map_or(PATIENCE, |time| time.0),
        }))
    }

    /// The configuration of a rank that joins a group elsewhere and has the file at `model`;
    /// `None` if this is to be a worker.
    pub(crate) fn rank_config(&self, model: &Path) -> Result<Option<RankConfig>, ConfigError> {
        let Some(join) = &self.join else {
            return Ok(None);
        };
        let (Some(world), Some(rank), Some(secret)) =
            (self.tensor_parallel, self.rank, &self.rank_secret)
        else {
            return Err(incomplete(
                "tensor_parallel, rank and rank_secret with join",
            ));
        };
        Ok(Some(RankConfig {
            model: model.to_owned(),
            rank,
            world: world.get(),
            join: join.parse()?,
            listen: self.rank_listen.unwrap_or(([0, 0, 0, 0], 0).into()),
            probes: self.listen.map(|at| self.listen_config(at)).transpose()?,
            secret: secret.clone(),
            isa: self.isa.as_deref().map(parse_isa).transpose()?,
            threads: self.threads,
        }))
    }
}

fn incomplete(expected: &'static str) -> ConfigError {
    ConfigError::Incomplete {
        section: WorkerSettings::NAME,
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> LogConfig {
        LogConfig {
            format: shoal_fabric::telemetry::LogFormat::Human,
            filter: "info".into(),
        }
    }

    fn between() -> WorkerSettings {
        WorkerSettings {
            tensor_parallel: NonZeroUsize::new(2),
            rank_listen: Some(([0, 0, 0, 0], 7000).into()),
            rank_secret: Some("secret".into()),
            ..WorkerSettings::default()
        }
    }

    #[test]
    fn a_group_is_here_or_between_machines() {
        let of = |settings: WorkerSettings| settings.group_config(&log()).unwrap();
        assert_eq!(of(WorkerSettings::default()), None);
        let here = of(WorkerSettings {
            tensor_parallel: NonZeroUsize::new(3),
            ..WorkerSettings::default()
        });
        assert!(matches!(
            here,
            Some(GroupConfig {
                ranks: 3,
                others: Others::Local(_),
                ..
            })
        ));
        let Some(Others::Remote(remote)) = of(between()).map(|group| group.others) else {
            panic!("it is between machines");
        };
        assert_eq!(remote.payload, Payload::Bf16);
        let floats = WorkerSettings {
            rank_payload: Some("f32".into()),
            ..between()
        };
        let Some(Others::Remote(remote)) = of(floats).map(|group| group.others) else {
            panic!("it is between machines");
        };
        assert_eq!(remote.payload, Payload::F32);
    }

    #[test]
    fn what_goes_together_is_asked_for() {
        for spoil in [
            (|s: &mut WorkerSettings| s.rank_secret = None) as fn(&mut WorkerSettings),
            |s| s.rank_listen = None,
            |s| (s.rank_listen, s.rank_secret, s.rank_payload) = (None, None, Some("f32".into())),
            |s| s.rank_payload = Some("f16".into()),
            |s| s.tensor_parallel = None,
            |s| s.rank = Some(1),
        ] {
            let mut settings = between();
            spoil(&mut settings);
            assert!(settings.group_config(&log()).is_err(), "{settings:?}");
        }
    }

    #[test]
    fn a_rank_that_joins_needs_all_of_its_place() {
        let joining = || WorkerSettings {
            join: Some("host:7000".into()),
            rank: Some(1),
            ..between()
        };
        let config = |settings: WorkerSettings| settings.rank_config("model.gguf".as_ref());
        assert!(config(between()).unwrap().is_none());
        let rank = config(joining()).unwrap().unwrap();
        assert_eq!((rank.rank, rank.world, rank.join.port()), (1, 2, 7000));
        assert!(rank.probes.is_none());
        let probed = WorkerSettings {
            listen: Some(([127, 0, 0, 1], 9090).into()),
            ..joining()
        };
        let probes = config(probed).unwrap().unwrap().probes.unwrap();
        assert_eq!(probes.address.port(), 9090);
        for spoil in [
            (|s: &mut WorkerSettings| s.rank = None) as fn(&mut WorkerSettings),
            |s| s.tensor_parallel = None,
            |s| s.rank_secret = None,
            |s| s.join = Some("host".into()),
        ] {
            let mut settings = joining();
            spoil(&mut settings);
            assert!(config(settings.clone()).is_err(), "{settings:?}");
        }
    }
}
