//! SentencePiece vocabularies: a part of a real one against llama.cpp, and small ones of our own.

use proptest::prelude::*;
use serde::Deserialize;
use shoal_proto::worker::TokenizerBundle;
use shoal_proto::worker::tokenizer_bundle::Kind;
use shoal_text::{Detokenizer, EncodeOptions, TextError, Tokenizer};

const PLAIN: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: false,
};
const MARKUP: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: true,
};

#[derive(Deserialize)]
struct Fixture {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<u32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

fn fixture() -> (TokenizerBundle, Vec<Case>) {
    let fixture: Fixture =
        serde_json::from_str(include_str!("data/sentencepiece.json")).expect("the fixture is JSON");
    let bundle = TokenizerBundle {
        kind: Kind::Sentencepiece.into(),
        tokens: fixture.tokens,
        scores: fixture.scores,
        token_types: fixture.types,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        add_bos: true,
        add_space_prefix: true,
        ..Default::default()
    };
    (bundle, fixture.cases)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::new(&fixture().0).expect("the fixture is valid")
}

#[test]
fn tokenization_is_that_of_llama_cpp() {
    let (bundle, cases) = fixture();
    let tokenizer = Tokenizer::new(&bundle).expect("the fixture is valid");
    assert_eq!(cases.len(), 45);
    for Case { text, ids } in cases {
        let tokens = tokenizer.encode(&text, PLAIN).expect("encodes");
        assert_eq!(tokens, ids, "{text:?}");
        assert_eq!(tokenizer.decode(&tokens), text);
    }
}

#[test]
fn bos_is_added_on_request() {
    let tokenizer = tokenizer();
    let options = EncodeOptions {
        add_special: true,
        ..PLAIN
    };
    assert_eq!(tokenizer.encode("", options).expect("encodes"), [1]);
    let plain = tokenizer.encode("Hello", PLAIN).expect("encodes");
    assert_eq!(
        tokenizer.encode("Hello", options).expect("encodes"),
        [&[1], &plain[..]].concat()
    );
}

#[test]
fn text_after_markup_starts_with_a_blank_that_is_not_shown() {
    let tokenizer = tokenizer();
    let text = "<s>Hello</s> world";
    let tokens = tokenizer.encode(text, MARKUP).expect("encodes");
    assert_eq!(tokens[0], 1);
    assert_eq!(tokenizer.token_bytes(tokens[1]), b" Hello");
    assert_eq!(tokenizer.decode(&tokens), text);
}

#[test]
fn the_first_blank_of_an_answer_depends_on_what_it_follows() {
    let tokenizer = tokenizer();
    let hello = tokenizer.encode("Hello", PLAIN).expect("encodes");
    let shown_after = |previous| {
        let mut shown = String::new();
        let mut detokenizer = Detokenizer::new(&tokenizer, previous);
        for &token in &hello {
            detokenizer.push(token, &mut shown);
        }
        detokenizer.finish(&mut shown);
        shown
    };
    assert_eq!(shown_after(None), "Hello");
    assert_eq!(shown_after(Some(1)), "Hello");
    assert_eq!(shown_after(hello.last().copied()), " Hello");
}

/// Letters and two merges, without byte tokens.
fn small(unknown: Option<u32>) -> Tokenizer {
    let tokens = ["<unk>", "▁", "a", "b", "ab", "▁a"];
    Tokenizer::new(&TokenizerBundle {
        kind: Kind::Sentencepiece.into(),
        tokens: tokens.map(str::to_owned).to_vec(),
        scores: vec![0.0, -1.0, -1.0, -1.0, -2.0, -3.0],
        token_types: vec![2, 1, 1, 1, 1, 1],
        unknown,
        ..Default::default()
    })
    .expect("valid")
}

#[test]
fn the_better_score_merges_first() {
    assert_eq!(
        small(None).encode(" ab a", PLAIN).expect("encodes"),
        [1, 4, 5]
    );
}

#[test]
fn without_byte_tokens_a_foreign_character_is_unknown_or_refused() {
    assert_eq!(small(Some(0)).encode("aé", PLAIN).expect("encodes"), [2, 0]);
    let error = small(None).encode("aé", PLAIN).err();
    assert!(matches!(
        error,
        Some(TextError::NoTokenForByte { byte: 0xc3 })
    ));
}

proptest! {
    /// SentencePiece writes a blank as `▁`, so that this character alone does not come back.
    #[test]
    fn decoding_inverts_encoding(text in "(\\PC|[a-z ]{1,5}|<s>|\n){0,20}") {
        prop_assume!(!text.contains('▁'));
        let tokenizer = tokenizer();
        for options in [PLAIN, MARKUP] {
            let tokens = tokenizer.encode(&text, options).expect("encodes");
            prop_assert_eq!(tokenizer.decode(&tokens), text.as_str());
        }
    }
}
