//! `shoal model`: the model files of this machine.

use std::fs::File;
use std::io::{self, BufWriter, Write};

use indicatif::HumanBytes;
use shoal_gguf::testmodel::{Family, RopeScaling, TestModel};

use crate::args::{FetchArgs, InspectArgs, ListArgs, RandomArgs};
use crate::config::{ConfigFile, StoreSettings};
use crate::error::CliError;
use crate::inspect::{Details, inspect};
use crate::store::Store;

/// The store that flags, environment and file describe.
pub(crate) fn store(settings: &StoreSettings, file: &ConfigFile) -> Result<Store, CliError> {
    let settings = file.merge(settings)?;
    Ok(Store::new(settings.try_into()?))
}

/// Shows what a model file holds.
pub(crate) fn show(args: &InspectArgs, file: &ConfigFile) -> Result<(), CliError> {
    let path = store(&args.store, file)?.resolve(&args.model)?;
    let details = Details {
        metadata: args.metadata,
        tensors: args.tensors,
    };
    let inspection = inspect(&path, details).map_err(|source| CliError::Model { path, source })?;
    print(|out| match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&inspection)?),
        false => write!(out, "{inspection}"),
    })
}

/// Fetches a model where it is not cached yet, and prints its path.
pub(crate) fn fetch(args: &FetchArgs, file: &ConfigFile) -> Result<(), CliError> {
    let path = store(&args.store, file)?.resolve(&args.model)?;
    print(|out| writeln!(out, "{}", path.display()))
}

/// Lists the cached models.
pub(crate) fn list(args: &ListArgs, file: &ConfigFile) -> Result<(), CliError> {
    let models = store(&args.store, file)?.list()?;
    print(|out| {
        if args.json {
            serde_json::to_writer_pretty(&mut *out, &models)?;
            return writeln!(out);
        }
        let width = models.iter().map(|m| m.name.len()).max().unwrap_or(0);
        for model in &models {
            let size = HumanBytes(model.bytes).to_string();
            writeln!(
                out,
                "{:width$}  {size:>10}  {}",
                model.name,
                model.path.display()
            )?;
        }
        Ok(())
    })
}

/// Writes a model of random weights.
pub(crate) fn random(args: &RandomArgs) -> Result<(), CliError> {
    let recipe = TestModel {
        family: Family::Llama,
        layers: args.layers,
        d_model: args.width,
        heads: args.heads,
        kv_heads: args.kv_heads,
        head_dim: args.head_dim,
        d_ff: args.ff,
        vocab: args.vocab,
        context: args.context,
        rope_base: 500_000.0,
        rope_scaling: RopeScaling::None,
        tied_head: true,
        qkv_bias: false,
        weights: args.weights,
        mix: Vec::new(),
        seed: 1,
    };
    let path = || args.out.clone();
    let model = recipe.build().map_err(|source| CliError::Model {
        path: path(),
        source,
    })?;
    let write = || {
        let mut out = BufWriter::new(File::create(&args.out)?);
        model.write(&mut out)?;
        out.flush()
    };
    write().map_err(|source| CliError::Write {
        path: path(),
        source,
    })
}

/// Writes to standard output; a reader that has gone away is no error.
pub(crate) fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match write(&mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::Output(e)),
        _ => Ok(()),
    }
}
