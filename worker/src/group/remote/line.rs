//! What rank 0 and a rank elsewhere say to each other outside of steps: JSON over TCP. The end of
//! the line is the end of the rank's place, not of the rank.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::group::line::Part;

/// Longest message, bytes.
const MAX_MESSAGE: usize = 16 << 10;

/// What rank 0 tells a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// Load this part of the model, unless it is loaded. The file, the instruction set and the
    /// threads are the rank's own.
    Load(Part),
    /// Meet the others.
    Meet {
        /// The formation of the group.
        epoch: u64,
        /// How long to wait for another rank within a step, milliseconds.
        patience_ms: u64,
        /// Most words of a frame.
        words: usize,
        /// Where the ranks between rank 0 and this one are.
        below: Vec<SocketAddr>,
    },
    /// Be gone: the weights are not those of rank 0, or its program computes otherwise.
    Differs,
}

pub(super) fn send<T: Serialize>(mut line: &TcpStream, message: &T) -> io::Result<()> {
    let message = serde_json::to_vec(message)?;
    if message.len() > MAX_MESSAGE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut frame = (message.len() as u32).to_le_bytes().to_vec();
    frame.extend(message);
    line.write_all(&frame)
}

/// Waits for a message; `None` at the end of the line.
pub(super) fn receive<T: DeserializeOwned>(mut line: &TcpStream) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    if line.peek(&mut length)? == 0 {
        return Ok(None);
    }
    line.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut message = vec![0; length];
    line.read_exact(&mut message)?;
    Ok(Some(serde_json::from_slice(&message)?))
}
