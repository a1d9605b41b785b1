//! A byte-level BPE vocabulary that tokenizes any text.

use crate::{GgufError, GgufWriter, Strings};

/// ChatML, as Qwen and SmolLM have it.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const IM_END: u32 = 2;

/// The special tokens and the bytes.
pub const MIN_VOCAB: usize = SPECIAL.len() + 256;

/// Token types, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// Adds a tokenizer of `vocab` tokens: the special ones, the bytes, merges of letters, and
/// padding where those run out.
pub(super) fn add(
    file: &mut GgufWriter<'_>,
    vocab: usize,
    pre_tokenizer: &str,
) -> Result<(), GgufError> {
    assert!(
        vocab >= MIN_VOCAB,
        "a vocabulary of {vocab} tokens, but at least {MIN_VOCAB} are needed"
    );
    let merges: Vec<(String, char)> = merges().take(vocab - MIN_VOCAB).collect();
    let used = MIN_VOCAB + merges.len();
    let tokens: Strings = SPECIAL
        .into_iter()
        .map(str::to_owned)
        .chain((0..=255).map(|byte| letter(byte).to_string()))
        .chain(merges.iter().map(|(left, right)| format!("{left}{right}")))
        .chain((used..vocab).map(|id| format!("[PAD{id}]")))
        .collect();
    let mut types = vec![NORMAL; vocab];
    types[..SPECIAL.len()].fill(CONTROL);
    types[used..].fill(UNUSED);
    let merges: Strings = merges
        .iter()
        .map(|(left, right)| format!("{left} {right}"))
        .collect();

    file.metadata("tokenizer.ggml.model", "gpt2")?;
    file.metadata("tokenizer.ggml.pre", pre_tokenizer)?;
    file.metadata("tokenizer.ggml.tokens", tokens)?;
    file.metadata("tokenizer.ggml.token_type", types)?;
    file.metadata("tokenizer.ggml.merges", merges)?;
    file.metadata("tokenizer.ggml.bos_token_id", 1u32)?;
    file.metadata("tokenizer.ggml.eos_token_id", IM_END)?;
    file.metadata("tokenizer.ggml.add_bos_token", false)?;
    file.metadata("tokenizer.chat_template", CHAT_TEMPLATE)
}

/// The letter that stands for a byte in GPT-2's vocabulary: itself if it is printable, else
/// the next one from U+0100.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(0x100 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Pairs of letters, the first perhaps a space, then these with a third letter.
fn merges() -> impl Iterator<Item = (String, char)> {
    let pairs = || {
        let first = std::iter::once(letter(b' ')).chain('a'..='z');
        first.flat_map(|left| ('a'..='z').map(move |right| (left.to_string(), right)))
    };
    let triples = pairs().flat_map(|(left, middle)| {
        ('a'..='z').map(move |right| (format!("{left}{middle}"), right))
    });
    pairs().chain(triples)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::Gguf;

    #[test]
    fn tokens_are_unique_and_merges_make_tokens() {
        for vocab in [MIN_VOCAB, 512, 20_000] {
            let mut file = GgufWriter::new();
            add(&mut file, vocab, "smollm").unwrap();
            let gguf = Gguf::parse(file.to_bytes()).unwrap();
            let tokens: &Strings = gguf.require("tokenizer.ggml.tokens").unwrap();
            let set: HashSet<&str> = tokens.iter().collect();
            assert_eq!((tokens.len(), set.len()), (vocab, vocab));
            let merges: &Strings = gguf.require("tokenizer.ggml.merges").unwrap();
            for merge in merges.iter() {
                let (left, right) = merge.split_once(' ').unwrap();
                assert!(set.contains(left) && set.contains(right), "{merge}");
                assert!(set.contains(&*format!("{left}{right}")), "{merge}");
            }
        }
    }

    /// Known from every byte-level BPE vocabulary.
    #[test]
    fn letters_are_gpt2s() {
        assert_eq!(
            [b' ', b'\n', b'a', 0, 0xad].map(letter),
            ['Ġ', 'Ċ', 'a', 'Ā', 'Ń']
        );
    }
}
