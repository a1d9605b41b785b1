//! How a rank makes itself known to another: what it wants, and a proof by each side that it has
//! the secret of the group, which itself never travels.
//!
//! The one who dials says hello with a nonce; the other answers with a nonce of its own and an
//! HMAC-SHA256 of both; the first sends the like, under another label, and gets a verdict.
//! What follows is neither encrypted nor authenticated.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use rustix::net::sockopt;
use shoal_core::Class;

/// Says what is spoken here; the last byte is its version.
const MAGIC: [u8; 8] = *b"shoalrk\x01";
const NONCE: usize = 32;
const PROOF: usize = 32;
const FIELDS: usize = 4 * 4 + 2 * 8;
const HELLO: usize = MAGIC.len() + FIELDS + NONCE;
const VERDICT: usize = 4 + 8;

/// The least length of a secret, bytes.
const LEAST_SECRET: usize = 16;

/// After so long without a sign of the other machine a connection is dead.
const IDLE: Duration = Duration::from_secs(2);
const PROBE: Duration = Duration::from_secs(1);
const PROBES: u32 = 3;
const UNHEARD: Duration = Duration::from_secs(5);

/// What the ranks of a group know and nobody else.
pub struct Secret(hmac::Key);

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Anybody could guess it.
    #[error("{}: a group's secret has at least {LEAST_SECRET} bytes", path.display())]
    Short {
        /// The file.
        path: PathBuf,
    },
}

impl SecretError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        Class::Fatal
    }
}

impl Secret {
    /// Of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// What is in a file, but for white space around it.
    ///
    /// # Errors
    /// When it cannot be read or has less than 16 bytes.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let path = path.to_owned();
        match std::fs::read(&path) {
            Ok(bytes) if bytes.trim_ascii().len() >= LEAST_SECRET => {
                Ok(Self::new(bytes.trim_ascii()))
            }
            Ok(_) => Err(SecretError::Short { path }),
            Err(source) => Err(SecretError::Read { path, source }),
        }
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be a rank: rank 0 gives its orders here.
    Join,
    /// To meet in a formation of the group.
    Meet,
}

/// What a rank says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What it wants.
    pub purpose: Purpose,
    /// Which it is.
    pub rank: usize,
    /// Ranks of its group.
    pub world: usize,
    /// Where ranks above it can reach it; 0 if nowhere.
    pub port: u16,
    /// The formation that it wants to meet in.
    pub epoch: u64,
    /// Tells its process from others.
    pub instance: u64,
}

/// Why a rank is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does not know the group's secret.
    #[error("its secret is not the group's")]
    Secret,
    /// It takes the group for one of another size.
    #[error("the group has {ours} ranks")]
    World {
        /// Ranks there are.
        ours: usize,
    },
    /// Others cannot be this rank.
    #[error("the group has no such rank for others")]
    Rank,
    /// Another process is that rank.
    #[error("another process is this rank already")]
    Taken,
    /// It wants what it does not get here.
    #[error("it does not get this here; rank 0 takes ranks")]
    Purpose,
    /// It is of another formation.
    #[error("the group has epoch {ours}")]
    Epoch {
        /// The formation there is.
        ours: u64,
    },
}

/// Why two ranks do not come to speak.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// It is no rank, or one of another version.
    #[error("the other side is no rank of this version")]
    Protocol,
    /// The other side does not know the group's secret.
    #[error("the other side's secret is not this rank's")]
    Secret,
    /// One of both says no.
    #[error("refused: {0}")]
    Refused(Refusal),
}

impl HelloError {
    /// What to do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Io(_) | Self::Refused(Refusal::Epoch { .. }) => Class::Retry,
            _ => Class::Fatal,
        }
    }
}

impl Hello {
    fn encode(&self) -> [u8; MAGIC.len() + FIELDS] {
        let purpose = match self.purpose {
            Purpose::Join => 0,
            Purpose::Meet => 1,
        };
        let words = [
            purpose,
            self.rank as u32,
            self.world as u32,
            u32::from(self.port),
        ];
        let mut bytes = [0; MAGIC.len() + FIELDS];
        let longs = [self.epoch, self.instance];
        let all = MAGIC
            .into_iter()
            .chain(words.into_iter().flat_map(u32::to_le_bytes))
            .chain(longs.into_iter().flat_map(u64::to_le_bytes));
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        bytes
    }

    /// `None` if the bytes are of no hello.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (words, rest) = rest.split_at_checked(16)?;
        let word = |at: usize| words.as_chunks().0.get(at).map(|w| u32::from_le_bytes(*w));
        let long = |at: usize| rest.as_chunks().0.get(at).map(|w| u64::from_le_bytes(*w));
        Some(Self {
            purpose: match word(0)? {
                0 => Purpose::Join,
                1 => Purpose::Meet,
                _ => return None,
            },
            rank: word(1)? as usize,
            world: word(2)? as usize,
            port: u16::try_from(word(3)?).ok()?,
            epoch: long(0)?,
            instance: long(1)?,
        })
    }
}

fn encode_verdict(verdict: Result<(), Refusal>) -> [u8; VERDICT] {
    let (code, detail) = match verdict {
        Ok(()) => (0u32, 0),
        Err(Refusal::Secret) => (1, 0),
        Err(Refusal::World { ours }) => (2, ours as u64),
        Err(Refusal::Rank) => (3, 0),
        Err(Refusal::Taken) => (4, 0),
        Err(Refusal::Purpose) => (5, 0),
        Err(Refusal::Epoch { ours }) => (6, ours),
    };
    let mut bytes = [0; VERDICT];
    bytes[..4].copy_from_slice(&code.to_le_bytes());
    bytes[4..].copy_from_slice(&detail.to_le_bytes());
    bytes
}

fn decode_verdict(bytes: &[u8; VERDICT]) -> Result<(), HelloError> {
    let (code, rest) = bytes.split_at(4);
    let detail = rest.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
    Err(HelloError::Refused(match code {
        [0, 0, 0, 0] => return Ok(()),
        [1, 0, 0, 0] => Refusal::Secret,
        [2, 0, 0, 0] => Refusal::World {
            ours: detail as usize,
        },
        [3, 0, 0, 0] => Refusal::Rank,
        [4, 0, 0, 0] => Refusal::Taken,
        [5, 0, 0, 0] => Refusal::Purpose,
        [6, 0, 0, 0] => Refusal::Epoch { ours: detail },
        _ => return Err(HelloError::Protocol),
    }))
}

/// A connection that must be done with the hello by a time.
struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(left),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(bytes)
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (mut bytes, mut got) = ([0; N], 0);
        while got < N {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(&mut bytes[got..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| io::Error::other("no random numbers"))?;
    Ok(bytes)
}

/// A number that no other process has.
///
/// # Errors
/// When the system has no random numbers.
pub fn instance() -> io::Result<u64> {
    random().map(u64::from_le_bytes)
}

/// The two sides of a proof, which must not be taken for each other.
const HOST: &[u8] = b"host";
const GUEST: &[u8] = b"guest";

fn transcript(side: &[u8], hello: &[u8; HELLO], answer: &[u8; NONCE]) -> Vec<u8> {
    [side, hello, answer].concat()
}

/// Connects to a rank within `limit`, and gets in.
///
/// # Errors
/// When nobody is there, or one side refuses the other.
pub fn dial(
    address: impl ToSocketAddrs,
    hello: &Hello,
    secret: &Secret,
    limit: Duration,
) -> Result<TcpStream, HelloError> {
    let until = Instant::now() + limit;
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in address.to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now());
        match TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1))) {
            Ok(stream) => {
                ask(&stream, hello, secret, until)?;
                settle(&stream)?;
                return Ok(stream);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure.into())
}

fn ask(
    stream: &TcpStream,
    hello: &Hello,
    secret: &Secret,
    until: Instant,
) -> Result<(), HelloError> {
    stream.set_nodelay(true)?;
    let mut timed = Timed { stream, until };
    let mut said = [0; HELLO];
    said[..HELLO - NONCE].copy_from_slice(&hello.encode());
    said[HELLO - NONCE..].copy_from_slice(&random::<NONCE>()?);
    timed.send(&said)?;
    let answer: [u8; NONCE] = timed.receive()?;
    let proof: [u8; PROOF] = timed.receive()?;
    let known = hmac::verify(&secret.0, &transcript(HOST, &said, &answer), &proof).is_ok();
    // Also where it is of no use: so the other side learns why.
    let proof = hmac::sign(&secret.0, &transcript(GUEST, &said, &answer));
    timed.send(proof.as_ref())?;
    let verdict = timed.receive();
    match known {
        true => decode_verdict(&verdict?),
        false => Err(HelloError::Secret),
    }
}

/// Takes the hello of a connection by `until`, and lets it in if `admit` does.
pub(super) fn greet(
    stream: &TcpStream,
    secret: &Secret,
    until: Instant,
    admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
) -> Result<Hello, HelloError> {
    stream.set_nodelay(true)?;
    let mut timed = Timed { stream, until };
    let said: [u8; HELLO] = timed.receive()?;
    let hello = Hello::decode(&said).ok_or(HelloError::Protocol)?;
    let answer: [u8; NONCE] = random()?;
    let proof = hmac::sign(&secret.0, &transcript(HOST, &said, &answer));
    timed.send(&[&answer[..], proof.as_ref()].concat())?;
    let proof: [u8; PROOF] = timed.receive()?;
    let known = hmac::verify(&secret.0, &transcript(GUEST, &said, &answer), &proof);
    let verdict = known.map_err(|_| Refusal::Secret);
    let verdict = verdict.and_then(|()| admit(&hello));
    timed.send(&encode_verdict(verdict))?;
    verdict.map_err(HelloError::Refused)?;
    settle(stream)?;
    Ok(hello)
}

/// Ends the hello: no more time limits, but for a machine that is gone.
fn settle(stream: &TcpStream) -> Result<(), HelloError> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    let set = || {
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, IDLE)?;
        sockopt::set_tcp_keepintvl(stream, PROBE)?;
        sockopt::set_tcp_keepcnt(stream, PROBES)?;
        // Probes are sent only where nothing else waits for an answer.
        sockopt::set_tcp_user_timeout(stream, UNHEARD.as_millis() as u32)
    };
    Ok(set().map_err(io::Error::from)?)
}
