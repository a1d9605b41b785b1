//! `shoal router` and `shoal worker`: one role of a cluster, alone or under `shoal up`.

use std::sync::Arc;

use shoal_fabric::shutdown::{Phase, Shutdown};
use shoal_fabric::telemetry::LogConfig;
use shoal_router::{RouterArgs, RouterConfig};

use crate::config::{ConfigError, MembershipSettings, RouterSettings, WorkerSettings};
use crate::error::{CliError, chain};
use crate::store::{ModelSource, Store};
use crate::up::{Control, Report};

/// Runs a router until it is told to end.
pub(crate) async fn router(
    settings: RouterSettings,
    membership: MembershipSettings,
    supervised: bool,
) -> Result<(), CliError> {
    let (shutdown, control) = begin(supervised)?;
    let run = async {
        let mut args = RouterArgs::try_from(settings)?;
        args.membership = membership.start("router", args.listen, args.advertise.is_some())?;
        if args.membership.is_some() && !args.workers.is_empty() {
            return Err(ConfigError::TwoMemberships.into());
        }
        if let (None, Some(control)) = (&args.membership, &control) {
            args.membership = Some(Arc::new(control.workers()));
        }
        let config = RouterConfig::try_from(args)?;
        Ok(shoal_router::run(config, shutdown.clone()).await?)
    };
    report_to(control.as_deref(), shutdown.clone(), run).await
}

/// Runs a worker until it is told to end.
pub(crate) async fn worker(
    settings: WorkerSettings,
    log: LogConfig,
    membership: MembershipSettings,
    store: Store,
    supervised: bool,
) -> Result<(), CliError> {
    let (shutdown, control) = begin(supervised)?;
    let run = async {
        let source: ModelSource = match &settings.model {
            Some(name) => name.parse().map_err(ConfigError::Model)?,
            None => ModelSource::default(),
        };
        let path = tokio::task::spawn_blocking(move || store.resolve(&source)).await??;
        if let Some(config) = settings.rank_config(&path)? {
            return Ok(shoal_worker::join_group(config, shutdown.clone()).await?);
        }
        let mut config = settings.config(path, &log)?;
        let (listen, advertised) = (config.listen.address, config.advertise.is_some());
        if let Some(membership) = membership.start("worker", listen, advertised)? {
            config.membership = membership;
        }
        Ok(shoal_worker::run(config, shutdown.clone()).await?)
    };
    report_to(control.as_deref(), shutdown.clone(), run).await
}

fn begin(supervised: bool) -> Result<(Shutdown, Option<Arc<Control>>), CliError> {
    let shutdown = Shutdown::on_signals().map_err(CliError::Signals)?;
    let control = supervised.then(|| Control::attach(shutdown.clone()));
    let control = control.transpose().map_err(CliError::Supervisor)?;
    Ok((shutdown, control.map(Arc::new)))
}

/// Runs a role, and tells the supervisor how far it has come.
async fn report_to(
    control: Option<&Control>,
    shutdown: Shutdown,
    run: impl Future<Output = Result<(), CliError>>,
) -> Result<(), CliError> {
    let Some(control) = control else {
        return run.await;
    };
    let mut phase = shutdown.phase();
    let follow = async {
        use std::io::Result;
        let mut told = Phase::default();
        loop {
            let now = *phase.borrow_and_update();
            if let Some(address) = now.address.filter(|_| told.address.is_none()) {
                control.report(&Report::Listening(address))?;
            }
            if now.ready && !told.ready {
                control.report(&Report::Ready)?;
            }
            told = now;
            if phase.changed().await.is_err() {
                return std::future::pending::<Result<()>>().await;
            }
        }
    };
    tokio::pin!(run);
    let result = tokio::select! {
        result = &mut run => result,
        Err(source) = follow => Err(CliError::Supervisor(source)),
    };
    if let Err(error) = &result {
        // Where the supervisor is gone, the exit status alone tells.
        let _ = control.report(&Report::Failed(chain(error)));
    }
    result
}
