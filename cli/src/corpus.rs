//! `shoal corpus`: the public text that drafts, over gRPC.

use std::io::{self, Read};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use shoal_core::Class;
use shoal_proto::inference::corpus_client::CorpusClient;
use shoal_proto::inference::{
    DropTextRequest, EraseAnswersRequest, ListTextsRequest, LoadTextRequest,
};

use crate::client::{ClientArgs, ClientError, status_class};

/// What to do with the text that drafts.
#[derive(Subcommand, Debug)]
pub(crate) enum CorpusCommand {
    /// Load public texts, such as knowledge-base articles, or replace them
    #[command(after_help = "\
Examples:
  shoal corpus load articles/*.md
  fetch-macros | shoal corpus load - --name macros")]
    Load(LoadArgs),

    /// List the public texts
    List(ListArgs),

    /// Drop public texts
    Drop(DropArgs),

    /// Forget the answers to a user, or to all users
    Erase(EraseArgs),
}

/// Options of `shoal corpus load`.
#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// Files of UTF-8 text; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Name of the text, of a single file [default: the file's path]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Model that it drafts for; needed only where the router serves several
    #[arg(long, value_name = "NAME", default_value = "")]
    model: String,
}

/// Options of `shoal corpus list`.
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `shoal corpus drop`.
#[derive(Args, Debug)]
pub(crate) struct DropArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// Names of the texts
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Options of `shoal corpus erase`.
#[derive(Args, Debug)]
pub(crate) struct EraseArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// Whose answers to forget
    #[arg(long, value_name = "NAME", required_unless_present = "all")]
    user: Option<String>,

    /// Forget the answers to all users
    #[arg(long, conflicts_with = "user")]
    all: bool,
}

/// Why the text that drafts could not be changed or told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CorpusError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("--name names one text, and {0} are given")]
    OneName(usize),
    #[error("refused: {}", .0.message())]
    Refused(#[source] Box<tonic::Status>),
}

impl From<tonic::Status> for CorpusError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl CorpusError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Client(error) => error.class(),
            Self::Read { .. } | Self::OneName(_) => Class::Client,
            Self::Refused(status) => status_class(status),
        }
    }
}

/// Runs a command; gives the lines to print.
pub(crate) async fn run(command: CorpusCommand) -> Result<Vec<String>, CorpusError> {
    match command {
        CorpusCommand::Load(args) => load(args).await,
        CorpusCommand::List(args) => {
            let mut client = CorpusClient::new(args.client.connect().await?);
            let listed = client.list_texts(ListTextsRequest {}).await?.into_inner();
            let line = |text: &shoal_proto::inference::PublicText| {
                format!("{:>8}  {}  {}", text.tokens, text.model, text.name)
            };
            Ok(listed.texts.iter().map(line).collect())
        }
        CorpusCommand::Drop(args) => {
            let mut client = CorpusClient::new(args.client.connect().await?);
            for name in args.names {
                client.drop_text(DropTextRequest { name }).await?;
            }
            Ok(Vec::new())
        }
        CorpusCommand::Erase(args) => {
            let mut client = CorpusClient::new(args.client.connect().await?);
            let user = args.user.unwrap_or_default();
            client.erase_answers(EraseAnswersRequest { user }).await?;
            Ok(Vec::new())
        }
    }
}

async fn load(args: LoadArgs) -> Result<Vec<String>, CorpusError> {
    if args.name.is_some() && args.files.len() > 1 {
        return Err(CorpusError::OneName(args.files.len()));
    }
    let mut client = CorpusClient::new(args.client.connect().await?);
    let mut lines = Vec::new();
    for path in args.files {
        let name = args.name.clone();
        let name = name.unwrap_or_else(|| path.display().to_string());
        let text = read(&path).map_err(|source| CorpusError::Read {
            path: path.clone(),
            source,
        })?;
        let request = LoadTextRequest {
            model: args.model.clone(),
            name: name.clone(),
            text,
        };
        let tokens = client.load_text(request).await?.into_inner().tokens;
        lines.push(format!("{tokens:>8}  {name}"));
    }
    Ok(lines)
}

fn read(path: &std::path::Path) -> io::Result<String> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path)
}
