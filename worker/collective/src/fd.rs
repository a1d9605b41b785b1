//! A line of text and a file descriptor over a unix socket (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Longest message, bytes.
pub const MAX_MESSAGE: usize = 16 << 10;

/// Sends a message of at most [`MAX_MESSAGE`] bytes, and a copy of `fd` with it.
///
/// # Errors
/// When the other side is gone, the socket's time limit passes, or it is too long.
pub fn send(socket: &UnixStream, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    if message.len() > MAX_MESSAGE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let length = (message.len() as u32).to_le_bytes();
    let mut frame = length.to_vec();
    frame.extend_from_slice(message);
    let fds = fd.map(|fd| [fd]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL;
    let mut sent = sendmsg(socket.as_fd(), &[IoSlice::new(&frame)], &mut control, flags)?;
    while sent < frame.len() {
        sent += rustix::net::send(socket.as_fd(), &frame[sent..], flags)?;
    }
    Ok(())
}

/// Waits for a message; `None` at the end of the stream.
///
/// # Errors
/// When the stream breaks within a message, or a message is too long.
pub fn receive(socket: &UnixStream) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut length = [0; 4];
    let (mut got, fd) = receive_some(socket, &mut length)?;
    if got == 0 {
        return Ok(None);
    }
    while got < length.len() {
        got += more(socket, &mut length[got..])?;
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut message = vec![0; length];
    let mut got = 0;
    while got < length {
        got += more(socket, &mut message[got..])?;
    }
    Ok(Some((message, fd)))
}

/// At least one byte of what must still come.
fn more(socket: &UnixStream, out: &mut [u8]) -> io::Result<usize> {
    match receive_some(socket, out)?.0 {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        got => Ok(got),
    }
}

fn receive_some(socket: &UnixStream, out: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(out)];
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match recvmsg(socket.as_fd(), &mut buffers, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    Ok((received.bytes, fd))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn messages_arrive_in_order_with_their_files() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        send(&ours, b"first", Some(reader.as_fd())).unwrap();
        send(&ours, b"", None).unwrap();
        let large = vec![7; MAX_MESSAGE];
        let sender = std::thread::spawn(move || send(&ours, &large, None).unwrap());
        let (first, fd) = receive(&theirs).unwrap().unwrap();
        assert_eq!(first, b"first");
        drop(reader);
        writer.write_all(b"through").unwrap();
        drop(writer);
        let mut text = String::new();
        File::from(fd.unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        let (second, fd) = receive(&theirs).unwrap().unwrap();
        assert!(second.is_empty() && fd.is_none());
        assert_eq!(receive(&theirs).unwrap().unwrap().0.len(), MAX_MESSAGE);
        sender.join().unwrap();
        assert!(receive(&theirs).unwrap().is_none());
    }

    #[test]
    fn what_is_too_long_or_cut_off_is_an_error() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        assert!(send(&ours, &vec![0; MAX_MESSAGE + 1], None).is_err());
        ours.write_all(&[5, 0, 0, 0, 1, 2]).unwrap();
        drop(ours);
        let error = receive(&theirs).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[255; 4]).unwrap();
        assert!(receive(&theirs).is_err());
    }
}
