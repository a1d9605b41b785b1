//! Where other ranks come in.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::hello::{Hello, HelloError, Refusal, Secret, greet};

/// What a hello may take.
const HELLO: Duration = Duration::from_secs(5);
/// Most that say hello at one time.
const CROWD: usize = 64;
/// Between looks whether the door is still open, and after a failure.
const LOOK: Duration = Duration::from_millis(100);

/// Whom a door lets in, and where to.
pub trait Visitors: Send + Sync {
    /// Whether a rank that has proved itself may come in.
    ///
    /// # Errors
    /// When it may not; it is told.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal>;

    /// It has come in, from an address. This is on the connection's own thread, which ends with
    /// this.
    fn enter(&self, hello: Hello, peer: SocketAddr, stream: TcpStream);

    /// Somebody has not.
    fn turned_away(&self, peer: SocketAddr, error: &HelloError);
}

/// A listener and its thread. It closes when this is dropped.
pub struct Door {
    address: SocketAddr,
    open: Arc<AtomicBool>,
}

impl Door {
    /// Listens for ranks that know the secret; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address is taken, or the system refuses.
    pub fn open(
        address: SocketAddr,
        secret: Arc<Secret>,
        visitors: Arc<dyn Visitors>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let open = Arc::new(AtomicBool::new(true));
        let door = Self {
            address,
            open: Arc::clone(&open),
        };
        std::thread::Builder::new()
            .name("door".into())
            .spawn(move || {
                let crowd = Arc::new(AtomicUsize::new(0));
                let look = Timespec::try_from(LOOK).ok();
                while open.load(Ordering::Acquire) {
                    let mut ready = [PollFd::new(&listener, PollFlags::IN)];
                    // Woken, late or interrupted: it looks in any case.
                    let _ = poll(&mut ready, look.as_ref());
                    match listener.accept() {
                        Ok((stream, peer)) => receive(stream, peer, &secret, &visitors, &crowd),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        // Of one connection, or for want of descriptors.
                        Err(_) => std::thread::sleep(LOOK),
                    }
                }
            })?;
        Ok(door)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.open.store(false, Ordering::Release);
    }
}

/// Hears a connection out on a thread of its own: one that says nothing holds up no other.
fn receive(
    stream: TcpStream,
    peer: SocketAddr,
    secret: &Arc<Secret>,
    visitors: &Arc<dyn Visitors>,
    crowd: &Arc<AtomicUsize>,
) {
    if crowd.fetch_add(1, Ordering::AcqRel) >= CROWD {
        crowd.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let place = Place(Arc::clone(crowd));
    let (secret, visitors) = (Arc::clone(secret), Arc::clone(visitors));
    let hear = move || {
        let until = Instant::now() + HELLO;
        let greeted = stream.set_nonblocking(false).map_err(HelloError::from);
        let greeted =
            greeted.and_then(|()| greet(&stream, &secret, until, |hello| visitors.admit(hello)));
        drop(place);
        match greeted {
            Ok(hello) => visitors.enter(hello, peer, stream),
            Err(error) => visitors.turned_away(peer, &error),
        }
    };
    // Without a thread the connection is closed, and comes again.
    let _ = std::thread::Builder::new()
        .name("visitor".into())
        .spawn(hear);
}

/// A place in the crowd, until the hello is over.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
