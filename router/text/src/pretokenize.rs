//! Pre-tokenizers of byte-level BPE: how a text falls into the pieces that merges do not cross.
//!
//! A model names its pre-tokenizer (`tokenizer.ggml.pre`); each is a chain of regular
//! expressions. An expression cuts every piece it is given into its matches and the gaps
//! between them, and the next one goes on with those.

use regex_automata::Input;
use regex_automata::meta::{BuildError, Regex};

/// One expression of a chain.
enum Stage {
    /// A plain expression.
    Plain(&'static str),
    /// An expression followed by the alternatives `\s+(?!\S)|\s+`: a run of whitespace leaves
    /// its last character to what follows it. Done by hand, for the automata have no look-around.
    Spaced(&'static str),
}
use Stage::{Plain, Spaced};

/// English contractions, whatever their case.
macro_rules! contractions {
    () => {
        "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    };
}

/// Words that start with a capital or go on in lower case, with `suffix` attached.
macro_rules! cased_words {
    ($suffix:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $suffix,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $suffix,
        )
    };
}

/// Chinese, Japanese kana.
const CJK: &str = "[一-龥぀-ゟ゠-ヿ]+";
const DIGIT: &str = r"\p{N}";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";
const LINES: &str = r"[^\n]+|\n+";

const GPT2: Stage = Spaced(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+");
const LLAMA3: Stage = Spaced(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
));
const QWEN2: Stage = Spaced(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
));
const QWEN35: Stage = Spaced(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
));
const UFAKZEKA: Stage =
    Spaced(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+");
const SEED_CODER: Stage = Spaced(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
));
const BAILING: Stage = Spaced(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]"
));
const MINICPM5: Stage = Spaced(concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
));
const DEEPSEEK3: Stage = Spaced(concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
));
const TEKKEN: Stage = Spaced(concat!(
    cased_words!(""),
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
));
const GPT4O: Stage = Spaced(concat!(
    cased_words!(concat!("(?:", contractions!(), ")?")),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
));
const YOUTU: Stage = Spaced(concat!(
    cased_words!(concat!("(?:", contractions!(), ")?")),
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
));
const BLOOM: Stage = Plain(r" ?[^(\s|.,!?…。，、।۔،)]+");
const EAST_ASIAN: Stage = Plain("[一-龥ࠀ-一가-\u{d7ff}]+");

/// What the name of a pre-tokenizer stands for.
pub(crate) struct Variant {
    chain: &'static [Stage],
    /// A piece that is a token as it stands is not merged at all.
    pub(crate) whole_pieces: bool,
    /// Prompts start with the BOS token unless the model says otherwise.
    pub(crate) add_bos: bool,
}

/// The pre-tokenizer called `pre`, if it is known. The names are llama.cpp's.
pub(crate) fn variant(pre: &str) -> Option<Variant> {
    let (chain, whole_pieces, add_bos): (&'static [Stage], bool, bool) = match pre {
        "" | "default" => (
            &[
                Plain(r"[\p{P}$+<=>^~|]+"),
                GPT2,
                Plain(r"\p{N}+"),
                Plain(THREE_DIGITS),
            ],
            false,
            false,
        ),
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling"
        | "exaone4" | "gigachat" | "a.x-4.0" | "mellum" | "modern-bert" | "roberta-bpe"
        | "jina-es" | "jina-de" | "jina-v1-en" | "jina-v2-es" | "jina-v2-de" | "jina-v2-code" => {
            (&[GPT2], false, false)
        }
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b"
        | "mellum2" => (&[Plain(DIGIT), GPT2], false, false),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
        | "lfm2" | "jina-v5-nano" => (&[LLAMA3], true, true),
        "glm4" | "glm5" => (&[LLAMA3], true, false),
        "dbrx" | "smaug-bpe" | "chatglm-bpe" => (&[LLAMA3], false, false),
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "megrez" | "hunyuan" | "solar-open"
        | "grok-2" | "kormo" | "f2llmv2" => (&[QWEN2], false, false),
        "qwen35" => (&[QWEN35], false, false),
        "ufakzeka" => (&[UFAKZEKA], false, false),
        "laguna" => (&[Plain(LINES), QWEN2], false, false),
        "seed-coder" => (&[SEED_CODER], false, false),
        "bailingmoe" | "bailingmoe2" | "llada-moe" => (&[BAILING], false, false),
        "minicpm5" => (&[Plain(r"\p{N}{1,3}"), MINICPM5], true, false),
        "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => {
            (&[Plain(r"\p{N}{1,3}"), Plain(CJK), DEEPSEEK3], false, false)
        }
        "deepseek-llm" => (
            &[
                Plain(r"[\r\n]"),
                Plain(r"\s?\p{LC}+"),
                Plain(r"\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+"),
                Plain(r"\s+\z"),
                EAST_ASIAN,
                Plain(r"\p{N}+"),
            ],
            false,
            false,
        ),
        "deepseek-coder" => (
            &[
                Plain(r"[\r\n]"),
                Plain(r"\s?\p{L}+"),
                Plain(r"\s?\p{P}+"),
                EAST_ASIAN,
                Plain(DIGIT),
            ],
            false,
            false,
        ),
        "falcon" => (
            &[Plain(r"[\p{P}$+<=>^~|`]+"), GPT2, Plain(THREE_DIGITS)],
            false,
            false,
        ),
        "tekken" => (&[TEKKEN], true, true),
        "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => (&[GPT4O], false, false),
        "youtu" => (
            &[
                Plain("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"),
                YOUTU,
            ],
            true,
            false,
        ),
        "bloom" | "poro-chat" | "gpt3-finnish" => (&[BLOOM], false, false),
        "viking" => (&[BLOOM, Plain(DIGIT)], false, false),
        _ => return None,
    };
    Some(Variant {
        chain,
        whole_pieces,
        add_bos,
    })
}

/// A chain of compiled expressions.
pub(crate) struct PreTokenizer {
    stages: Vec<Regex>,
}

/// The pattern of a run of whitespace in a [`Stage::Spaced`].
const SPACES: usize = 1;

impl PreTokenizer {
    pub(crate) fn new(variant: &Variant) -> Result<Self, Box<BuildError>> {
        let stages = variant
            .chain
            .iter()
            .map(|stage| {
                let regex = match stage {
                    Plain(pattern) => Regex::new(pattern),
                    Spaced(pattern) => Regex::new_many(&[pattern, r"\s+"]),
                };
                regex.map_err(Box::new)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { stages })
    }

    /// Hands the pieces of `text` to `emit`, from left to right; together they are the text.
    pub(crate) fn split<'t, E>(
        &self,
        text: &'t str,
        emit: &mut impl FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        split(&self.stages, text, emit)
    }
}

fn split<'t, E>(
    stages: &[Regex],
    text: &'t str,
    emit: &mut impl FnMut(&'t str) -> Result<(), E>,
) -> Result<(), E> {
    let Some((regex, rest)) = stages.split_first() else {
        return if text.is_empty() { Ok(()) } else { emit(text) };
    };
    let mut done = 0;
    while let Some(found) = regex.search(&Input::new(text).range(done..)) {
        let (start, mut end) = (found.start(), found.end());
        if found.pattern().as_usize() == SPACES && end < text.len() {
            let last = text[start..end]
                .char_indices()
                .next_back()
                .map_or(0, |(at, _)| at);
            if last > 0 {
                end = start + last;
            }
        }
        split(rest, &text[done..start], emit)?;
        split(rest, &text[start..end], emit)?;
        done = end;
    }
    split(rest, &text[done..], emit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn pieces(pre: &str, text: &str) -> Vec<String> {
        let splitter = PreTokenizer::new(&variant(pre).expect("known")).expect("compiles");
        let mut pieces = Vec::new();
        let done: Result<(), Infallible> = splitter.split(text, &mut |piece| {
            pieces.push(piece.to_owned());
            Ok(())
        });
        assert_eq!(done, Ok(()));
        pieces
    }

    #[test]
    fn whitespace_leaves_its_last_character_to_the_next_word() {
        assert_eq!(
            pieces("gpt-2", "a   b \t c  "),
            ["a", "  ", " b", " \t", " c", "  "]
        );
        assert_eq!(pieces("gpt-2", "a\tb"), ["a", "\t", "b"]);
        assert_eq!(pieces("llama-bpe", "a\n\n  b"), ["a", "\n\n", " ", " b"]);
        assert_eq!(
            pieces("qwen2", "x\u{3000}\u{3000}!"),
            ["x", "\u{3000}", "\u{3000}", "!"]
        );
    }

    #[test]
    fn a_later_stage_sees_one_piece_alone() {
        // Two blanks before a digit stay together: the digit is cut off first.
        assert_eq!(pieces("smollm", "a  12"), ["a", "  ", "1", "2"]);
    }

    #[test]
    fn pieces_are_those_of_the_models_own_tokenizers() {
        let fixture: std::collections::BTreeMap<String, Vec<Vec<String>>> =
            serde_json::from_str(include_str!("../tests/data/splits.json")).expect("JSON");
        assert_eq!(fixture.len(), 20);
        for (pre, texts) in fixture {
            assert!(!texts.is_empty());
            for expected in texts {
                assert_eq!(pieces(&pre, &expected.concat()), expected, "{pre}");
            }
        }
    }

    #[test]
    fn an_unknown_name_is_no_variant() {
        assert!(variant("no-such-thing").is_none());
    }
}
