//! The tiny byte-level model of the tests.

use shoal_proto::worker::{TokenizerBundle, tokenizer_bundle::Kind};

/// The token that ends an answer.
pub(crate) const END: u32 = 256;

/// GPT-2's printable stand-ins for bytes.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

/// One token per byte, `<end>`, and the markup of a chat.
pub(crate) fn bundle() -> TokenizerBundle {
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
    tokens.extend(["<end>", "<user>", "<bot>"].map(str::to_owned));
    let mut token_types = vec![1; 256];
    token_types.extend([3; 3]);
    TokenizerBundle {
        kind: Kind::ByteBpe as i32,
        pre: "gpt-2".into(),
        tokens,
        token_types,
        eos: Some(END),
        end_tokens: vec![END],
        chat_template: "{% for m in messages %}{% if m.role == 'bad' %}\
            {{ raise_exception('bad role') }}{% endif %}<user>{{ m.content }}{% endfor %}\
            {% if add_generation_prompt %}<bot>{% endif %}"
            .into(),
        ..TokenizerBundle::default()
    }
}
