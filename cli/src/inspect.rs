//! `shoal model inspect`: what a GGUF file holds, and what it would need to run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use indicatif::HumanBytes;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use shoal_gguf::{Array, Gguf, GgufError, Value};

/// Bytes of a key or value element in the KV cache (bfloat16).
const KV_BYTES: u64 = 2;

/// Elements of an array that are shown.
const ARRAY_SHOWN: usize = 8;

/// Characters of a text that are shown.
const TEXT_SHOWN: usize = 100;

/// What a file holds.
#[derive(Debug, Serialize)]
pub(crate) struct Inspection {
    name: Option<String>,
    architecture: String,
    gguf_version: u32,
    shape: Shape,
    parameters: u64,
    /// By type: tensors, parameters and bytes.
    quantization: BTreeMap<&'static str, Share>,
    tokenizer: Tokenizer,
    memory: Memory,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Map<String, Json>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<Tensor>>,
}

/// Dimensions, as the metadata gives them; absent where it does not.
#[derive(Debug, Serialize)]
struct Shape {
    layers: Option<u64>,
    width: Option<u64>,
    heads: Option<u64>,
    kv_heads: Option<u64>,
    head_width: Option<u64>,
    feed_forward: Option<u64>,
    vocabulary: Option<u64>,
    context: Option<u64>,
}

#[derive(Debug, Default, Serialize)]
struct Share {
    tensors: u64,
    parameters: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Tokenizer {
    kind: Option<String>,
    pre: Option<String>,
    tokens: Option<usize>,
    chat_template: Option<String>,
}

#[derive(Debug, Serialize)]
struct Memory {
    weights_bytes: u64,
    /// Keys and values of one token in all layers, of 16 bits.
    kv_bytes_per_token: Option<u64>,
    /// The same for a sequence as long as the model takes.
    kv_bytes_per_context: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    #[serde(rename = "type")]
    ty: &'static str,
    shape: Vec<usize>,
    bytes: u64,
}

/// What to show beside the summary.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Details {
    pub(crate) metadata: bool,
    pub(crate) tensors: bool,
}

/// Reads the file at `path`; an error where it is no sound GGUF file of a model.
pub(crate) fn inspect(path: &Path, details: Details) -> Result<Inspection, GgufError> {
    let gguf = Gguf::open(path)?;
    let architecture: &str = gguf.require("general.architecture")?;
    let shape = Shape::read(&gguf, architecture)?;
    let mut quantization = BTreeMap::<_, Share>::new();
    for tensor in gguf.tensors() {
        let share = quantization.entry(tensor.ty.name()).or_default();
        share.tensors += 1;
        share.parameters += tensor.shape.iter().product::<usize>() as u64;
        share.bytes += tensor.data.len() as u64;
    }
    let text = |key| Ok(gguf.get::<&str>(key)?.map(str::to_owned));
    let kv_bytes_per_token = shape.kv_bytes_per_token();
    Ok(Inspection {
        name: text("general.name")?,
        architecture: architecture.to_owned(),
        gguf_version: gguf.version(),
        parameters: quantization.values().map(|share| share.parameters).sum(),
        tokenizer: Tokenizer {
            kind: text("tokenizer.ggml.model")?,
            pre: text("tokenizer.ggml.pre")?,
            tokens: tokens(&gguf),
            chat_template: text("tokenizer.chat_template")?,
        },
        memory: Memory {
            weights_bytes: quantization.values().map(|share| share.bytes).sum(),
            kv_bytes_per_token,
            kv_bytes_per_context: kv_bytes_per_token
                .zip(shape.context)
                .and_then(|(bytes, tokens)| bytes.checked_mul(tokens)),
        },
        metadata: details.metadata.then(|| {
            let entries = gguf.entries();
            entries
                .map(|(key, value)| (key.to_owned(), plain(value)))
                .collect()
        }),
        tensors: details.tensors.then(|| {
            let tensors = gguf.tensors().map(|tensor| Tensor {
                name: tensor.name.to_owned(),
                ty: tensor.ty.name(),
                shape: tensor.shape.to_vec(),
                bytes: tensor.data.len() as u64,
            });
            tensors.collect()
        }),
        shape,
        quantization,
    })
}

impl Shape {
    fn read(gguf: &Gguf, architecture: &str) -> Result<Self, GgufError> {
        let number = |key: &str| gguf.get::<u64>(&format!("{architecture}.{key}"));
        let width = number("embedding_length")?;
        let heads = number("attention.head_count")?;
        let head_width = match number("attention.key_length")? {
            Some(width) => Some(width),
            None => width.zip(heads).and_then(|(w, n)| w.checked_div(n)),
        };
        let vocabulary = match number("vocab_size")? {
            Some(size) => Some(size),
            None => tokens(gguf).map(|n| n as u64),
        };
        Ok(Self {
            layers: number("block_count")?,
            width,
            heads,
            kv_heads: number("attention.head_count_kv")?.or(heads),
            head_width,
            feed_forward: number("feed_forward_length")?,
            vocabulary,
            context: number("context_length")?,
        })
    }

    fn kv_bytes_per_token(&self) -> Option<u64> {
        let width = self.kv_heads?.checked_mul(self.head_width?)?;
        width.checked_mul(self.layers?)?.checked_mul(2 * KV_BYTES)
    }
}

fn tokens(gguf: &Gguf) -> Option<usize> {
    match gguf.metadata("tokenizer.ggml.tokens") {
        Some(Value::Array(Array::Str(tokens))) => Some(tokens.len()),
        _ => None,
    }
}

/// A metadata value as JSON; of a long array its beginning and its length.
fn plain(value: &Value) -> Json {
    fn list<T: Clone + Into<Json>>(values: &[T]) -> Json {
        shorten(values.len(), values.iter().cloned().map(Into::into))
    }
    match value {
        Value::U8(n) => json!(n),
        Value::I8(n) => json!(n),
        Value::U16(n) => json!(n),
        Value::I16(n) => json!(n),
        Value::U32(n) => json!(n),
        Value::I32(n) => json!(n),
        Value::F32(n) => json!(n),
        Value::Bool(b) => json!(b),
        Value::Str(text) => json!(text),
        Value::U64(n) => json!(n),
        Value::I64(n) => json!(n),
        Value::F64(n) => json!(n),
        Value::Array(array) => match array {
            Array::U8(values) => list(values),
            Array::I8(values) => list(values),
            Array::U16(values) => list(values),
            Array::I16(values) => list(values),
            Array::U32(values) => list(values),
            Array::I32(values) => list(values),
            Array::F32(values) => list(values),
            Array::Bool(values) => list(values),
            Array::Str(values) => shorten(values.len(), values.iter().map(Json::from)),
            Array::U64(values) => list(values),
            Array::I64(values) => list(values),
            Array::F64(values) => list(values),
        },
    }
}

fn shorten(length: usize, values: impl Iterator<Item = Json>) -> Json {
    let first: Vec<Json> = values.take(ARRAY_SHOWN).collect();
    if length <= ARRAY_SHOWN {
        return Json::Array(first);
    }
    json!({"length": length, "first": first})
}

/// A text that fits a line.
fn line(text: &str) -> String {
    let flat = text.replace('\n', "\\n");
    match flat.char_indices().nth(TEXT_SHOWN) {
        Some((end, _)) => format!("{}…", &flat[..end]),
        None => flat,
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_dash = |value: Option<u64>| value.map_or("-".to_owned(), |n| n.to_string());
        let bytes =
            |value: Option<u64>| value.map_or("-".to_owned(), |n| HumanBytes(n).to_string());
        let shape = &self.shape;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: String| {
            writeln!(f, "{name:<18}{value}")
        };
        row(
            f,
            "name",
            self.name.clone().unwrap_or_else(|| "-".to_owned()),
        )?;
        row(f, "architecture", self.architecture.clone())?;
        row(f, "format", format!("GGUF version {}", self.gguf_version))?;
        row(
            f,
            "parameters",
            format!("{:.1} million", self.parameters as f64 / 1e6),
        )?;
        row(f, "layers", or_dash(shape.layers))?;
        row(f, "width", or_dash(shape.width))?;
        let heads = [shape.heads, shape.kv_heads, shape.head_width].map(or_dash);
        let [heads, kv_heads, head_width] = heads;
        row(
            f,
            "heads",
            format!("{heads} (KV {kv_heads}), {head_width} wide"),
        )?;
        row(f, "feed-forward", or_dash(shape.feed_forward))?;
        row(f, "vocabulary", or_dash(shape.vocabulary))?;
        row(f, "context", or_dash(shape.context))?;
        let tokenizer = &self.tokenizer;
        let kind = tokenizer.kind.as_deref().unwrap_or("-");
        let pre = tokenizer.pre.as_deref().unwrap_or("default");
        row(f, "tokenizer", format!("{kind}, pre-tokenizer {pre}"))?;
        let template = tokenizer
            .chat_template
            .as_deref()
            .map_or("-".to_owned(), line);
        row(f, "chat template", template)?;
        row(f, "weights", bytes(Some(self.memory.weights_bytes)))?;
        let of_numbers = |value: Option<u64>| match value {
            Some(_) => format!("{} of 16-bit numbers", bytes(value)),
            None => bytes(None),
        };
        row(
            f,
            "KV per token",
            of_numbers(self.memory.kv_bytes_per_token),
        )?;
        row(
            f,
            "KV per context",
            of_numbers(self.memory.kv_bytes_per_context),
        )?;
        writeln!(
            f,
            "\n{:<8}{:>8}{:>16}{:>14}",
            "type", "tensors", "parameters", "bytes"
        )?;
        for (ty, share) in &self.quantization {
            let size = HumanBytes(share.bytes).to_string();
            writeln!(
                f,
                "{ty:<8}{:>8}{:>16}{size:>14}",
                share.tensors, share.parameters
            )?;
        }
        if let Some(metadata) = &self.metadata {
            writeln!(f)?;
            for (key, value) in metadata {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                writeln!(f, "{key} = {}", line(&value))?;
            }
        }
        if let Some(tensors) = &self.tensors {
            writeln!(f)?;
            let width = tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
            for tensor in tensors {
                let Tensor {
                    name,
                    ty,
                    shape,
                    bytes,
                } = tensor;
                writeln!(
                    f,
                    "{name:width$}  {ty:<6} {:<16} {bytes:>12}",
                    format!("{shape:?}")
                )?;
            }
        }
        Ok(())
    }
}
