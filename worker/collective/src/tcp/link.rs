//! The connection to another rank: what of a call is written to it, and what has come.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use super::frame::{Content, Header};
use crate::CollectiveError;

/// Bytes that are read at once, at least.
const READ: usize = 64 << 10;

/// What the next frame must be.
#[derive(Clone, Copy)]
pub(super) struct Expected {
    pub(super) epoch: u64,
    pub(super) number: u32,
    pub(super) content: Content,
    /// Most words.
    pub(super) max: usize,
}

/// A connection that never waits.
pub(super) struct Link {
    rank: usize,
    stream: TcpStream,
    /// Bytes of the outgoing frame that are still to be written.
    pub(super) unsent: usize,
    /// A frame of the other rank's must still come.
    pub(super) due: bool,
    inbox: Vec<u8>,
    /// Where in the inbox the bytes are that have come and were not taken.
    start: usize,
    end: usize,
}

impl Link {
    pub(super) fn new(rank: usize, stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            rank,
            stream,
            unsent: 0,
            due: false,
            inbox: vec![0; READ],
            start: 0,
            end: 0,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether this call has no more to do here.
    pub(super) fn is_done(&self) -> bool {
        self.unsent == 0 && !self.due
    }

    /// Writes what can be written of `frame`.
    pub(super) fn push(&mut self, frame: &[u8]) -> Result<(), CollectiveError> {
        while self.unsent > 0 {
            match self.stream.write(&frame[frame.len() - self.unsent..]) {
                Ok(written) => self.unsent -= written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.lost()),
            }
        }
        Ok(())
    }

    /// Reads what has come of the frame that is due.
    pub(super) fn pull(&mut self, expected: Expected) -> Result<(), CollectiveError> {
        while self.due {
            let mut need = Header::BYTES;
            if let Some(head) = self.head(0) {
                need += self.check(head, expected)?.body();
                if self.end - self.start >= need {
                    self.due = false;
                    return Ok(());
                }
            }
            if !self.read(need)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes the frame that has come: its length and its bytes.
    pub(super) fn take(&mut self) -> (usize, &[u8]) {
        let Some(header) = self.head(0).and_then(Header::decode) else {
            return (0, &[]);
        };
        let body = self.start + Header::BYTES;
        self.start = body + header.body();
        (header.len as usize, &self.inbox[body..self.start])
    }

    /// Why the connection has ended: the other side may have blamed a third in its last words.
    pub(super) fn lost(&mut self) -> CollectiveError {
        // Frames of this call and of the next may be before them.
        while matches!(self.read(self.end - self.start + 1), Ok(true)) {}
        let mut at = 0;
        while let Some(header) = self.head(at).and_then(Header::decode) {
            if header.content == Content::Farewell {
                let rank = header.len as usize;
                return CollectiveError::PeerLost { rank };
            }
            at += Header::BYTES + header.body();
        }
        CollectiveError::PeerLost { rank: self.rank }
    }

    /// Ends the connection, after last words that blame a rank.
    pub(super) fn leave(&mut self, epoch: u64, blamed: usize) {
        // Within a frame they would not be understood.
        if self.unsent == 0 {
            let mut words = Vec::with_capacity(Header::BYTES);
            let header = Header {
                epoch,
                number: 0,
                len: blamed as u32,
                content: Content::Farewell,
            };
            header.encode(&mut words);
            // Where they do not go through, the end of the connection tells enough.
            let _ = self.stream.write(&words);
        }
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The head of the frame that begins `at` bytes after what was taken.
    fn head(&self, at: usize) -> Option<&[u8; Header::BYTES]> {
        self.inbox[self.start..self.end].get(at..)?.first_chunk()
    }

    fn check(
        &self,
        head: &[u8; Header::BYTES],
        expected: Expected,
    ) -> Result<Header, CollectiveError> {
        let rank = self.rank;
        let header = Header::decode(head).ok_or(CollectiveError::Frame { rank })?;
        let words = header.len as usize;
        let ours = expected.epoch;
        match header {
            Header { epoch, .. } if epoch != ours => Err(CollectiveError::StaleEpoch {
                ours,
                theirs: epoch,
            }),
            Header {
                content: Content::Farewell,
                ..
            } => Err(CollectiveError::PeerLost { rank: words }),
            Header {
                number, content, ..
            } if (number, content) != (expected.number, expected.content) => {
                Err(CollectiveError::Frame { rank })
            }
            _ if words > expected.max => Err(CollectiveError::TooLarge {
                words,
                max: expected.max,
            }),
            _ => Ok(header),
        }
    }

    /// Reads what has come, with room for `need` bytes; whether there was anything.
    fn read(&mut self, need: usize) -> Result<bool, CollectiveError> {
        if self.start > 0 {
            self.inbox.copy_within(self.start..self.end, 0);
            self.end -= std::mem::take(&mut self.start);
        }
        if self.inbox.len() < need {
            self.inbox.resize(need.next_multiple_of(READ), 0);
        }
        loop {
            match self.stream.read(&mut self.inbox[self.end..]) {
                Ok(0) => return Err(self.gone()),
                Ok(got) => {
                    self.end += got;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.gone()),
            }
        }
    }

    fn gone(&self) -> CollectiveError {
        CollectiveError::PeerLost { rank: self.rank }
    }
}
