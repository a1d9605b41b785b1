//! `shoal bench engine`: steps of a model on the CPU backend, beside the limits of the machine.

mod case;
mod measure;
mod report;

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::Args;
use shoal_core::{Class, ParamError};
use shoal_engine::backend::BackendError;
use shoal_engine::cpu::PromptPrecision;
use shoal_engine::spec::SpecError;
use shoal_gguf::GgufError;
use shoal_kernels::Isa;
use shoal_kernels::kv::KvType;
use shoal_worker::{parse_isa, parse_kv_type, parse_prompts};

use crate::config::StoreSettings;
use crate::store::ModelSource;

pub(crate) use measure::run;

/// Options of `shoal bench engine`.
#[derive(Args, Debug)]
pub(crate) struct EngineArgs {
    /// A GGUF file, hf://ORG/REPO/FILE[@REVISION], or demo
    #[arg(default_value_t)]
    pub(crate) model: ModelSource,

    /// Threads that compute [default: one per CPU]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Instruction set: scalar, neon, avx2, avx512 or avx512bf16 [default: the machine's best]
    #[arg(long, value_name = "ISA", value_parser = parse_isa)]
    isa: Option<Isa>,

    /// Activations of prompts: int8, bf16 or bf16-tiles [default: bf16-tiles with AMX, else int8]
    #[arg(long, value_name = "int8|bf16|bf16-tiles", value_parser = parse_prompts)]
    prompt_precision: Option<PromptPrecision>,

    /// What keys and values are kept as: int16, bf16 or int8 [default: int16]
    #[arg(long, value_name = "TYPE", value_parser = parse_kv_type)]
    kv_type: Option<KvType>,

    /// Temperature that tokens are drawn at; 0 takes the most likely
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,

    /// Only the cases whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,

    /// How long each case is repeated
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    time: Duration,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) store: StoreSettings,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineBenchError {
    #[error("it is no usable model")]
    File(#[from] GgufError),
    #[error("it is no supported model")]
    Spec(#[from] SpecError),
    #[error("the engine failed")]
    Backend(#[from] BackendError),
    #[error("this machine has no {0:?}")]
    Isa(Isa),
    #[error("no case has a name with {0:?}")]
    NoCase(String),
    #[error(transparent)]
    Param(#[from] ParamError),
    #[error("the system refused memory or a thread")]
    System(#[from] std::io::Error),
}

impl EngineBenchError {
    /// What the user should do about it.
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::File(error) => error.class(),
            Self::Spec(error) => error.class(),
            Self::Backend(error) => error.class(),
            Self::Isa(_) | Self::NoCase(_) | Self::Param(_) => Class::Client,
            Self::System(_) => Class::Fatal,
        }
    }
}
