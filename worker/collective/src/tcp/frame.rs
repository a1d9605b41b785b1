//! The head of a frame.

use super::Payload;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Words of rank 0.
    Words,
    /// A part of a sum.
    Part(Payload),
    /// A part of what is gathered: its bits.
    Piece,
    /// Nothing: its sender leaves, and the rank in place of the length is why.
    Farewell,
}

/// What is before the words of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The formation of the group.
    pub(super) epoch: u64,
    /// The call.
    pub(super) number: u32,
    /// Words, or numbers, that follow.
    pub(super) len: u32,
    pub(super) content: Content,
}

impl Header {
    /// Bytes of a header.
    pub(super) const BYTES: usize = 17;

    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.len.to_le_bytes());
        out.push(match self.content {
            Content::Words => 0,
            Content::Part(Payload::F32) => 1,
            Content::Part(Payload::Bf16) => 2,
            Content::Part(Payload::Int8) => 3,
            Content::Piece => 4,
            Content::Farewell => 5,
        });
    }

    /// `None` if the bytes are no header.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let (epoch, rest) = bytes.split_first_chunk()?;
        let (number, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let content = match rest {
            [0] => Content::Words,
            [1] => Content::Part(Payload::F32),
            [2] => Content::Part(Payload::Bf16),
            [3] => Content::Part(Payload::Int8),
            [4] => Content::Piece,
            [5] => Content::Farewell,
            _ => return None,
        };
        Some(Self {
            epoch: u64::from_le_bytes(*epoch),
            number: u32::from_le_bytes(*number),
            len: u32::from_le_bytes(*len),
            content,
        })
    }

    /// Bytes that follow.
    pub(super) fn body(&self) -> usize {
        let len = self.len as usize;
        match self.content {
            Content::Words | Content::Piece => Payload::F32.bytes(len),
            Content::Part(payload) => payload.bytes(len),
            Content::Farewell => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back() {
        let parts = Payload::ALL.map(Content::Part);
        for content in [Content::Words, Content::Piece, Content::Farewell]
            .into_iter()
            .chain(parts)
        {
            let header = Header {
                epoch: 1 << 40 | 7,
                number: 9,
                len: 65,
                content,
            };
            let mut bytes = Vec::new();
            header.encode(&mut bytes);
            let bytes: [u8; Header::BYTES] = bytes.try_into().unwrap();
            assert_eq!(Header::decode(&bytes), Some(header));
        }
        let mut bytes = [0; Header::BYTES];
        bytes[Header::BYTES - 1] = 6;
        assert_eq!(Header::decode(&bytes), None);
    }
}
