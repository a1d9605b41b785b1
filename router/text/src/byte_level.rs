//! The alphabet of byte-level BPE (GPT-2): every byte has a printable character of its own,
//! so that vocabularies can be written as text.

/// The character that stands for a byte: itself where it is printable Latin-1, else one of
/// the characters from U+0100 on, in order.
pub(crate) fn alphabet() -> [char; 256] {
    let mut alphabet = ['\0'; 256];
    let mut spare = '\u{100}'..;
    for byte in 0..=u8::MAX {
        alphabet[usize::from(byte)] = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => spare.next().unwrap_or_default(),
        };
    }
    alphabet
}

/// Turns token texts back into bytes.
pub(crate) struct Decoder {
    /// By code point; all characters of the alphabet are below U+0144.
    bytes: [Option<u8>; 0x144],
}

impl Decoder {
    pub(crate) fn new() -> Self {
        let mut bytes = [None; 0x144];
        for (byte, char) in (0..=u8::MAX).zip(alphabet()) {
            bytes[char as usize] = Some(byte);
        }
        Self { bytes }
    }

    /// Appends the bytes that `text` stands for; a character outside the alphabet stands for itself.
    pub(crate) fn decode(&self, text: &str, out: &mut Vec<u8>) {
        for char in text.chars() {
            match self.bytes.get(char as usize) {
                Some(&Some(byte)) => out.push(byte),
                _ => out.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_gpt2s() {
        let alphabet = alphabet();
        assert_eq!(alphabet[usize::from(b' ')], 'Ġ');
        assert_eq!(alphabet[usize::from(b'\n')], 'Ċ');
        assert_eq!(alphabet[usize::from(b'A')], 'A');
        assert_eq!(alphabet[0xad], '\u{143}');
    }

    #[test]
    fn decoding_inverts_the_alphabet() {
        let text: String = alphabet().iter().collect();
        let mut bytes = Vec::new();
        Decoder::new().decode(&text, &mut bytes);
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
    }

    #[test]
    fn a_foreign_character_stands_for_itself() {
        let mut bytes = Vec::new();
        Decoder::new().decode("a▁ĠÀ", &mut bytes);
        assert_eq!(bytes, b"a\xe2\x96\x81 \xc0");
    }
}
