use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;

/// Longer than a busy machine holds a thread up.
const PATIENCE: Duration = Duration::from_secs(20);

fn terms(epoch: u64) -> Terms {
    Terms {
        epoch,
        payload: Payload::Bf16,
        words: 64,
        patience: PATIENCE,
    }
}

fn secret() -> Arc<Secret> {
    Arc::new(Secret::new(b"the secret of these ranks"))
}

/// What came to a door.
enum Event {
    Entered(Hello, TcpStream),
    TurnedAway(HelloError),
}

/// Lets ranks of a lobby in, and tells of all.
struct House {
    lobby: Lobby,
    rank: usize,
    world: usize,
    events: Mutex<Sender<Event>>,
}

impl House {
    fn new(rank: usize, world: usize) -> (Arc<Self>, Receiver<Event>) {
        let (events, seen) = channel();
        let house = Self {
            lobby: Lobby::default(),
            rank,
            world,
            events: Mutex::new(events),
        };
        (Arc::new(house), seen)
    }

    fn tell(&self, event: Event) {
        self.events.lock().unwrap().send(event).unwrap();
    }

    fn door(self: &Arc<Self>) -> Door {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        Door::open(address, secret(), Arc::clone(self) as _).unwrap()
    }
}

impl Visitors for House {
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        match hello.purpose {
            Purpose::Join => Err(Refusal::Taken),
            Purpose::Meet => self.lobby.admit(hello, self.rank, self.world),
        }
    }

    fn enter(&self, hello: Hello, _: SocketAddr, stream: TcpStream) {
        self.lobby.enter(&hello, stream.try_clone().unwrap());
        self.tell(Event::Entered(hello, stream));
    }

    fn turned_away(&self, _: SocketAddr, error: &HelloError) {
        let error = match error {
            HelloError::Refused(refusal) => HelloError::Refused(*refusal),
            HelloError::Protocol => HelloError::Protocol,
            _ => HelloError::Secret,
        };
        self.tell(Event::TurnedAway(error));
    }
}

fn hello() -> Hello {
    Hello {
        purpose: Purpose::Meet,
        rank: 1,
        world: 2,
        port: 17,
        epoch: 5,
        instance: u64::MAX - 1,
    }
}

#[test]
fn who_knows_the_secret_comes_in() {
    let (house, seen) = House::new(0, 2);
    let door = house.door();
    let mut guest = dial(door.address(), &hello(), &secret(), PATIENCE).unwrap();
    let Event::Entered(said, mut host) = seen.recv().unwrap() else {
        panic!("it was turned away");
    };
    assert_eq!(said, hello());
    guest.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"ping");
    assert!(guest.nodelay().unwrap() && host.nodelay().unwrap());
}

#[test]
fn both_sides_learn_why_one_stays_out() {
    let (house, seen) = House::new(0, 2);
    house.lobby.expect(5);
    let door = house.door();
    let refused = |hello: Hello| {
        let error = dial(door.address(), &hello, &secret(), PATIENCE).unwrap_err();
        let Event::TurnedAway(HelloError::Refused(there)) = seen.recv().unwrap() else {
            panic!("it came in");
        };
        let HelloError::Refused(here) = error else {
            panic!("{error}");
        };
        assert_eq!(here, there);
        here
    };
    let base = hello();
    assert_eq!(
        refused(Hello { world: 3, ..base }),
        Refusal::World { ours: 2 }
    );
    assert_eq!(refused(Hello { rank: 0, ..base }), Refusal::Rank);
    assert_eq!(refused(Hello { rank: 2, ..base }), Refusal::Rank);
    assert_eq!(
        refused(Hello { epoch: 4, ..base }),
        Refusal::Epoch { ours: 5 }
    );
    let purpose = Purpose::Join;
    assert_eq!(refused(Hello { purpose, ..base }), Refusal::Taken);

    let other = Secret::new(b"another secret altogether");
    let error = dial(door.address(), &base, &other, PATIENCE).unwrap_err();
    assert!(matches!(error, HelloError::Secret), "{error}");
    let event = seen.recv().unwrap();
    assert!(matches!(
        event,
        Event::TurnedAway(HelloError::Refused(Refusal::Secret))
    ));

    // Somebody who speaks another language, and one who is spoken to in it.
    let mut stranger = TcpStream::connect(door.address()).unwrap();
    stranger.write_all(&[b'x'; 200]).unwrap();
    let event = seen.recv().unwrap();
    assert!(matches!(event, Event::TurnedAway(HelloError::Protocol)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let host = thread::spawn(move || listener.accept().unwrap().0.write_all(&[b'x'; 200]));
    let error = dial(address, &base, &secret(), PATIENCE).unwrap_err();
    assert!(
        matches!(error, HelloError::Secret | HelloError::Io(_)),
        "{error}"
    );
    host.join().unwrap().unwrap();
}

#[test]
fn secrets_are_read_from_files_and_have_a_length() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "the secret of these ranks\n").unwrap();
    let read = Secret::read(file.path()).unwrap();
    let (house, _seen) = House::new(0, 2);
    assert!(dial(house.door().address(), &hello(), &read, PATIENCE).is_ok());
    std::fs::write(&file, "      short      \n\n").unwrap();
    let error = Secret::read(file.path()).err().unwrap();
    assert!(matches!(error, SecretError::Short { .. }));
    let error = Secret::read("/nowhere".as_ref()).err().unwrap();
    assert!(matches!(error, SecretError::Read { .. }));
}

/// Three ranks that find each other through their doors, twice.
#[test]
fn ranks_meet_under_each_epoch_anew() {
    let houses: Vec<_> = (0..3).map(|rank| House::new(rank, 3)).collect();
    let doors: Vec<_> = houses.iter().map(|(house, _)| house.door()).collect();
    let below: Vec<_> = doors.iter().map(Door::address).collect();
    let seat = |rank: usize, epoch: u64| {
        let house = Arc::clone(&houses[rank].0);
        let below = below[..rank].to_vec();
        thread::spawn(move || {
            Seat {
                rank,
                below: &below,
                world: 3,
                lobby: &house.lobby,
                secret: &secret(),
                instance: rank as u64,
            }
            .take(terms(epoch))
        })
    };
    for epoch in [7, 8] {
        let seats: Vec<_> = (0..3).map(|rank| seat(rank, epoch)).collect();
        let meshes = seats.into_iter().map(|seat| seat.join().unwrap().unwrap());
        let meshes: Vec<Mesh> = meshes.collect();
        assert!(
            meshes
                .iter()
                .enumerate()
                .all(|(rank, mesh)| mesh.rank() == rank)
        );
    }
    let error = seat(2, 7).join().unwrap().err().unwrap();
    let stale = CollectiveError::StaleEpoch { ours: 7, theirs: 8 };
    assert_eq!(error.to_string(), stale.to_string());
}

/// Frames by hand, to a rank that expects a part of call 1 in epoch 3.
fn told(bytes: &[u8]) -> CollectiveError {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut liar = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (host, _) = listener.accept().unwrap();
    let mut mesh = Mesh::new(vec![None, Some(host)], terms(3)).unwrap();
    liar.write_all(bytes).unwrap();
    liar.shutdown(std::net::Shutdown::Write).unwrap();
    mesh.part(2).unwrap();
    mesh.exchange().err().unwrap()
}

#[test]
fn frames_that_are_none_of_this_call_are_refused() {
    let header = Header {
        epoch: 3,
        number: 1,
        len: 2,
        content: Content::Part(Payload::Bf16),
    };
    let bytes = |header: Header| {
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        bytes
    };
    let epoch = told(&bytes(Header { epoch: 2, ..header }));
    assert!(matches!(
        epoch,
        CollectiveError::StaleEpoch { ours: 3, theirs: 2 }
    ));
    let number = told(&bytes(Header {
        number: 2,
        ..header
    }));
    assert!(matches!(number, CollectiveError::Frame { rank: 1 }));
    let content = Content::Part(Payload::F32);
    let payload = told(&bytes(Header { content, ..header }));
    assert!(matches!(payload, CollectiveError::Frame { rank: 1 }));
    let long = told(&bytes(Header { len: 65, ..header }));
    assert!(matches!(
        long,
        CollectiveError::TooLarge { words: 65, max: 64 }
    ));
    let content = Content::Farewell;
    let blamed = told(&bytes(Header { content, ..header }));
    assert!(matches!(blamed, CollectiveError::PeerLost { rank: 2 }));
    assert!(matches!(told(&[9; 40]), CollectiveError::Frame { rank: 1 }));
    let mut short = bytes(Header { len: 1, ..header });
    short.extend([0; 2]);
    let mismatch = told(&short);
    assert!(matches!(
        mismatch,
        CollectiveError::Mismatch {
            rank: 1,
            got: 1,
            expected: 2
        }
    ));
    // It ends within a frame.
    assert!(matches!(
        told(&bytes(header)),
        CollectiveError::PeerLost { rank: 1 }
    ));
}
