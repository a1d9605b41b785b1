//! Tokenizer bundles from the metadata of GGUF files, read as llama.cpp reads it.

use shoal_core::TokenId;
use shoal_gguf::{Gguf, GgufError, Strings};
use shoal_proto::worker::TokenizerBundle;
use shoal_proto::worker::tokenizer_bundle::Kind;

use crate::error::TextError;
use crate::pretokenize::variant;

/// Token types of GGUF.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// Control tokens that end an answer, by their text: files do not always name them all.
const END_TEXTS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<｜end▁of▁sentence｜>",
    // Separators of training documents: what follows is another text.
    "<|fim_pad|>",
    "<|repo_name|>",
    "<reponame>",
    "<|file_sep|>",
];

/// Reads tokenizer and chat template of a model file.
///
/// # Errors
/// If the file lacks a tokenizer, has an unknown kind or pre-tokenizer, or mistyped entries.
pub fn bundle_from_gguf(gguf: &Gguf) -> Result<TokenizerBundle, TextError> {
    let model: &str = gguf.require("tokenizer.ggml.model")?;
    let kind = match model {
        "gpt2" => Kind::ByteBpe,
        "llama" => Kind::Sentencepiece,
        _ => {
            return Err(TextError::UnknownModel {
                model: model.to_owned(),
            });
        }
    };
    let sentencepiece = kind == Kind::Sentencepiece;
    let pre = gguf
        .get("tokenizer.ggml.pre")?
        .unwrap_or("default")
        .to_owned();
    let add_bos = if sentencepiece {
        true
    } else {
        let Some(variant) = variant(&pre) else {
            return Err(TextError::UnknownPreTokenizer { pre });
        };
        variant.add_bos
    };

    let tokens = strings(gguf.require("tokenizer.ggml.tokens")?);
    let mut token_types: Vec<u32> = gguf
        .get::<&[i32]>("tokenizer.ggml.token_type")?
        .unwrap_or_default()
        .iter()
        .map(|&ty| u32::try_from(ty).unwrap_or_default())
        .collect();
    // A file may call markup text; then any text could end an answer. (`</s>` is HTML, too.)
    for (ty, text) in token_types.iter_mut().zip(&tokens) {
        if *ty == USER_DEFINED && text != "</s>" && END_TEXTS.contains(&text.as_str()) {
            *ty = CONTROL;
        }
    }

    let id = |role: &str| token_id(gguf, role, tokens.len());
    let bos = id("bos")?.or(sentencepiece.then_some(1));
    let eos = id("eos")?.or(sentencepiece.then_some(2));
    let unknown = id("unknown")?.or(sentencepiece.then_some(0));
    let end_tokens = end_tokens(&tokens, &token_types, [eos, id("eot")?, id("eom")?]);

    let scores = if sentencepiece {
        gguf.get::<&[f32]>("tokenizer.ggml.scores")?
            .unwrap_or_default()
            .to_vec()
    } else {
        Vec::new()
    };
    let merges = if sentencepiece {
        Vec::new()
    } else {
        strings(gguf.require("tokenizer.ggml.merges")?)
    };
    let flag = |name: &str| gguf.get::<bool>(&format!("tokenizer.ggml.{name}"));
    Ok(TokenizerBundle {
        kind: kind.into(),
        pre,
        scores,
        merges,
        bos,
        eos,
        unknown,
        add_bos: flag("add_bos_token")?.unwrap_or(add_bos && bos.is_some()),
        add_eos: flag("add_eos_token")?.unwrap_or(false),
        add_space_prefix: flag("add_space_prefix")?.unwrap_or(sentencepiece),
        end_tokens,
        chat_template: gguf
            .get("tokenizer.chat_template")?
            .unwrap_or("")
            .to_owned(),
        tokens,
        token_types,
    })
}

fn strings(strings: &Strings) -> Vec<String> {
    strings.iter().map(str::to_owned).collect()
}

/// The token for a role, if the file names one of the vocabulary.
fn token_id(gguf: &Gguf, role: &str, tokens: usize) -> Result<Option<TokenId>, GgufError> {
    let id: Option<u32> = gguf.get(&format!("tokenizer.ggml.{role}_token_id"))?;
    Ok(id.filter(|&id| (id as usize) < tokens))
}

/// The tokens that end an answer, in ascending order.
fn end_tokens(tokens: &[String], types: &[u32], named: [Option<TokenId>; 3]) -> Vec<TokenId> {
    let mut ends: Vec<TokenId> = named.into_iter().flatten().collect();
    let mut texts = Vec::new();
    for ((id, text), &ty) in (0..).zip(tokens).zip(types) {
        if ty == CONTROL && END_TEXTS.contains(&text.as_str()) {
            ends.push(id);
            texts.push(text.as_str());
        }
    }
    // Where an answer has several messages, one of them ends without ending the answer.
    let has = |text| texts.contains(&text);
    if has("<|return|>") && has("<|call|>") || has("<|flush|>") && has("<|calls|>") {
        ends.retain(|&id| tokens[id as usize] != "<|end|>");
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_gguf::{GgufWriter, Value};

    /// A file with the given entries beside a small byte-level vocabulary.
    fn file(entries: &[(&str, Value)]) -> Gguf {
        let defaults: [(&str, Value); 4] = [
            ("model", "gpt2".into()),
            (
                "tokens",
                words(&["a", "b", "ab", "<|im_end|>", "</s>", "<|end|>"]),
            ),
            ("token_type", vec![1i32, 1, 1, 4, 4, 3].into()),
            ("merges", words(&["a b"])),
        ];
        let mut writer = GgufWriter::new();
        for (key, value) in entries {
            writer
                .metadata(&format!("tokenizer.{key}"), value.clone())
                .expect("new key");
        }
        for (key, value) in defaults {
            if !entries
                .iter()
                .any(|(other, _)| *other == format!("ggml.{key}"))
            {
                writer
                    .metadata(&format!("tokenizer.ggml.{key}"), value)
                    .expect("new key");
            }
        }
        Gguf::parse(writer.to_bytes()).expect("a valid file")
    }

    fn words(words: &[&str]) -> Value {
        words.iter().collect::<Strings>().into()
    }

    #[test]
    fn markup_that_is_called_text_becomes_markup() {
        let bundle = bundle_from_gguf(&file(&[])).expect("valid");
        assert_eq!(
            bundle.token_types,
            [1, 1, 1, CONTROL, USER_DEFINED, CONTROL]
        );
        assert_eq!(bundle.end_tokens, [3, 5]);
    }

    #[test]
    fn named_end_tokens_are_kept_whatever_their_text() {
        let file = file(&[
            ("ggml.eos_token_id", 1u32.into()),
            ("ggml.eot_token_id", 9u32.into()),
        ]);
        let bundle = bundle_from_gguf(&file).expect("valid");
        assert_eq!((bundle.eos, bundle.bos), (Some(1), None));
        assert_eq!(bundle.end_tokens, [1, 3, 5]);
    }

    #[test]
    fn a_message_may_end_without_ending_the_answer() {
        let file = file(&[
            ("ggml.tokens", words(&["<|end|>", "<|return|>", "<|call|>"])),
            ("ggml.token_type", vec![3i32; 3].into()),
        ]);
        assert_eq!(bundle_from_gguf(&file).expect("valid").end_tokens, [1, 2]);
    }

    #[test]
    fn defaults_depend_on_the_kind() {
        let llama = file(&[
            ("ggml.pre", "llama-bpe".into()),
            ("ggml.bos_token_id", 0u32.into()),
        ]);
        let llama = bundle_from_gguf(&llama).expect("valid");
        assert!(llama.add_bos && !llama.add_eos && !llama.add_space_prefix);

        let pieces = file(&[
            ("ggml.model", "llama".into()),
            ("ggml.scores", vec![-1f32; 6].into()),
            ("ggml.add_eos_token", true.into()),
        ]);
        let pieces = bundle_from_gguf(&pieces).expect("valid");
        assert!(pieces.add_bos && pieces.add_eos && pieces.add_space_prefix);
        assert_eq!(
            (pieces.bos, pieces.eos, pieces.unknown),
            (Some(1), Some(2), Some(0))
        );
        assert!(pieces.merges.is_empty() && pieces.scores.len() == 6);
    }

    #[test]
    fn unknown_kinds_are_named() {
        let error = bundle_from_gguf(&file(&[("ggml.model", "bert".into())])).err();
        assert!(matches!(error, Some(TextError::UnknownModel { model }) if model == "bert"));
        let error = bundle_from_gguf(&file(&[("ggml.pre", "new-one".into())])).err();
        assert!(matches!(error, Some(TextError::UnknownPreTokenizer { pre }) if pre == "new-one"));
        let error = bundle_from_gguf(&file(&[("ggml.merges", 1u32.into())])).err();
        assert!(matches!(
            error,
            Some(TextError::File(GgufError::WrongType { .. }))
        ));
    }
}
