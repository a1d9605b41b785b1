//! `shoal status`, `shoal drain` and `shoal undrain`: a running cluster, seen and changed
//! through one of its routers.

mod table;
mod view;

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use shoal_core::Class;
use shoal_proto::admin::admin_client::AdminClient;
use shoal_proto::admin::{DrainRequest, GetStatusRequest, UndrainRequest};
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use crate::client::{Bearer, ClientArgs, ClientError, status_class};
use crate::config::Time;

/// Between two looks with `--watch`.
const REFRESH: Duration = Duration::from_secs(1);
/// Cursor home, and what follows is cleared.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Options of `shoal status`.
#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// Look again every second, until Ctrl-C
    #[arg(long)]
    watch: bool,

    /// Print JSON, with --watch one object a line
    #[arg(long)]
    json: bool,
}

/// Options of `shoal drain`.
#[derive(Args, Debug)]
pub(crate) struct DrainArgs {
    /// The group, as `shoal status` names it
    group: String,

    /// Unfinished requests go on elsewhere after this long [default: they all finish]
    #[arg(long, value_name = "TIME")]
    deadline: Option<Time>,

    /// Return at once
    #[arg(long)]
    no_wait: bool,

    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `shoal undrain`.
#[derive(Args, Debug)]
pub(crate) struct UndrainArgs {
    /// The group, as `shoal status` names it
    group: String,

    #[command(flatten)]
    client: ClientArgs,
}

/// Why a cluster is not seen or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OperateError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{}", .0.message())]
    Refused(#[from] Status),
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl OperateError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Client(error) => error.class(),
            Self::Refused(status) => status_class(status),
            Self::Output(_) => Class::Fatal,
        }
    }
}

type Admin = AdminClient<InterceptedService<Channel, Bearer>>;

async fn admin(args: &ClientArgs) -> Result<Admin, ClientError> {
    Ok(AdminClient::new(args.connect().await?))
}

/// Shows the cluster, once or again and again.
pub(crate) async fn status(args: StatusArgs) -> Result<(), OperateError> {
    let mut admin = admin(&args.client).await?;
    let mut out = io::stdout();
    let terminal = out.is_terminal();
    let colour = terminal && std::env::var_os("NO_COLOR").is_none();
    loop {
        let answer = admin.get_status(GetStatusRequest {}).await;
        let text = match answer {
            Ok(answer) if args.json => format!("{}\n", view::json(answer.get_ref())),
            Ok(answer) => view::text(answer.get_ref(), colour),
            // A router that restarts is worth waiting for.
            Err(status) if args.watch && status_class(&status) == Class::Retry => {
                eprintln!("{}", status.message());
                String::new()
            }
            Err(status) => return Err(status.into()),
        };
        if args.watch && terminal && !args.json {
            out.write_all(CLEAR.as_bytes())?;
        }
        out.write_all(text.as_bytes())?;
        out.flush()?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(REFRESH).await;
    }
}

/// Drains a group.
pub(crate) async fn drain(args: DrainArgs) -> Result<(), OperateError> {
    let deadline = args.deadline.map_or(0, |time| {
        u32::try_from(time.0.as_millis()).unwrap_or(u32::MAX).max(1)
    });
    let request = DrainRequest {
        group: args.group.clone(),
        deadline_ms: deadline,
        wait: !args.no_wait,
    };
    let left = admin(&args.client).await?.drain(request).await?;
    let left = left.into_inner();
    let (group, sequences) = (args.group, left.running + left.waiting);
    let text = match sequences {
        0 => format!("{group} is drained"),
        n => format!("{group} drains: {n} sequences are left"),
    };
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Has a group take requests again.
pub(crate) async fn undrain(args: UndrainArgs) -> Result<(), OperateError> {
    let request = UndrainRequest {
        group: args.group.clone(),
    };
    admin(&args.client).await?.undrain(request).await?;
    Ok(writeln!(io::stdout(), "{} takes requests", args.group)?)
}
