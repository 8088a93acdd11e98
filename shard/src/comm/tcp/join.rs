//! How the ranks of a group find each other: from an identity to a connection between every two.
//!
//! All connect to rank 0, which tells them where the others listen once all have come; then each
//! connects to the ranks below it and waits for those above. Connections that do not prove the
//! group's key are dropped one by one and hold up nobody.
//!
//! Invariant: no wait outlasts the seat's limit or, by more than [`SLICE`], its abort; when a rank has
//! its connections it listens no longer.

use super::identity::{
    self, ADDRESS_BYTES, Identity, address_from_bytes, address_to_bytes, random,
};
use super::proof::{CONFIRM_BYTES, HELLO_BYTES, REPLY_BYTES, Talk, claimed_rank, hello};
use crate::clock;
use crate::comm::{CommError, Seat};
use ring::hmac;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

/// Longest sleep before looking whether the collective was aborted.
pub(super) const SLICE: Duration = Duration::from_millis(20);
/// Pause between looks at connections that are being examined, and before connecting again.
const PAUSE: Duration = Duration::from_millis(1);
const RETRY: Duration = Duration::from_millis(20);
/// Connections examined at the same time; of more, the oldest is dropped.
const MAX_STRANGERS: usize = 256;
/// Longest time for a connection to prove itself; a rank needs one round trip.
const PROOF_LIMIT: Duration = Duration::from_secs(5);

/// A connection to every other rank, by rank; none to itself. They do not block.
pub(super) fn join(
    identity: &Identity,
    seat: &Seat<'_>,
) -> Result<Vec<Option<TcpStream>>, CommError> {
    let joining = Joining {
        key: identity.key(),
        seat,
        deadline: clock::now() + seat.limit,
    };
    let mut peers: Vec<Option<TcpStream>> = (0..seat.world_size).map(|_| None).collect();
    match joining.form(identity, &mut peers) {
        Ok(()) => Ok(peers),
        Err(Stop::Aborted) => Err(CommError::Aborted),
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::Late) => Err(CommError::Incomplete {
            joined: 1 + u32::try_from(peers.iter().flatten().count()).unwrap_or(u32::MAX),
            world_size: seat.world_size,
            limit: seat.limit,
        }),
    }
}

/// Why a rank stops waiting.
#[derive(Debug)]
enum Stop {
    Aborted,
    Late,
    Failed(CommError),
}

impl From<CommError> for Stop {
    fn from(error: CommError) -> Self {
        Self::Failed(error)
    }
}

/// A connection that has not proven itself yet.
struct Stranger {
    stream: TcpStream,
    until: Instant,
    heard: Vec<u8>,
    /// What it was answered, once its hello was whole.
    reply: Option<[u8; REPLY_BYTES]>,
}

/// A rank that has proven itself.
struct Proven {
    rank: u32,
    stream: TcpStream,
    /// Where it listens for ranks above it.
    address: SocketAddr,
}

struct Joining<'a> {
    key: hmac::Key,
    seat: &'a Seat<'a>,
    deadline: Instant,
}

impl Joining<'_> {
    fn form(&self, identity: &Identity, peers: &mut [Option<TcpStream>]) -> Result<(), Stop> {
        let (rank, world_size) = (self.seat.rank, self.seat.world_size);
        if rank == 0 {
            let listener = identity.take_listener().ok_or_else(|| {
                CommError::Failed("the identity was made by another process".to_owned())
            })?;
            let mut addresses = vec![identity.address; world_size as usize];
            self.accept(&listener, peers, &mut addresses)?;
            let table: Vec<u8> = addresses.into_iter().flat_map(address_to_bytes).collect();
            for peer in peers.iter_mut().flatten() {
                // A fresh connection's buffer takes far more than a table.
                let _ = peer.write(&table);
            }
            return Ok(());
        }
        let interface = self.interface()?;
        let listener = identity::listen(interface)?;
        let own = listener.local_addr().map_err(|e| failed(&e))?;
        let mut first = self.connect((0, identity.address), own)?;
        let mut table = vec![0; world_size as usize * ADDRESS_BYTES];
        self.read(&mut first, &mut table)?;
        peers[0] = Some(first);
        let (table, _) = table.as_chunks::<ADDRESS_BYTES>();
        for lower in 1..rank {
            let address = address_from_bytes(table[lower as usize]);
            peers[lower as usize] = Some(self.connect((lower, address), own)?);
        }
        let mut addresses = vec![own; world_size as usize];
        self.accept(&listener, peers, &mut addresses)
    }

    fn interface(&self) -> Result<IpAddr, CommError> {
        let missing = "this rank was not told its address on the network between the hosts";
        let interface = self.seat.interface;
        interface.ok_or_else(|| CommError::Failed(missing.to_owned()))
    }

    /// Waits for the ranks above this one.
    fn accept(
        &self,
        listener: &TcpListener,
        peers: &mut [Option<TcpStream>],
        addresses: &mut [SocketAddr],
    ) -> Result<(), Stop> {
        let above = self.seat.rank as usize + 1;
        let mut strangers: Vec<Stranger> = Vec::new();
        while peers[above..].iter().any(Option::is_none) {
            self.check()?;
            while let Ok((stream, _)) = listener.accept() {
                if strangers.len() >= MAX_STRANGERS {
                    strangers.remove(0);
                }
                if stream.set_nonblocking(true).is_ok() {
                    strangers.push(Stranger {
                        stream,
                        until: clock::now() + PROOF_LIMIT,
                        heard: Vec::with_capacity(HELLO_BYTES + CONFIRM_BYTES),
                        reply: None,
                    });
                }
            }
            for stranger in std::mem::take(&mut strangers) {
                match self.examine(stranger) {
                    Examined::Unknown(stranger) => strangers.push(stranger),
                    Examined::Foreign => {}
                    Examined::Rank(proven) => {
                        let place = peers.get_mut(proven.rank as usize);
                        // A rank comes once, and lower ones do not come.
                        if let Some(place @ None) = place
                            && proven.rank as usize >= above
                        {
                            addresses[proven.rank as usize] = proven.address;
                            *place = Some(ready(proven.stream)?);
                        }
                    }
                }
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Hears what a stranger has to say by now.
    fn examine(&self, mut stranger: Stranger) -> Examined {
        let wanted = if stranger.reply.is_none() {
            HELLO_BYTES
        } else {
            HELLO_BYTES + CONFIRM_BYTES
        };
        let mut bytes = [0; HELLO_BYTES + CONFIRM_BYTES];
        let room = &mut bytes[..wanted - stranger.heard.len()];
        match stranger.stream.read(room) {
            Ok(count @ 1..) => stranger.heard.extend(&room[..count]),
            Err(e) if is_later(&e) && clock::now() < stranger.until => {}
            Ok(_) | Err(_) => return Examined::Foreign,
        }
        if stranger.heard.len() < wanted {
            return Examined::Unknown(stranger);
        }
        let Some((hello, confirm)) = stranger.heard.split_first_chunk::<HELLO_BYTES>() else {
            return Examined::Foreign;
        };
        let Some(rank) = claimed_rank(hello).filter(|rank| *rank < self.seat.world_size) else {
            return Examined::Foreign;
        };
        let talk = Talk {
            key: &self.key,
            hello,
            acceptor: self.seat.rank,
        };
        let Some(reply) = stranger.reply else {
            let Ok(nonce) = random() else {
                return Examined::Foreign;
            };
            let reply = talk.reply(nonce);
            stranger.reply = Some(reply);
            // An empty buffer takes these few bytes at once or the connection is broken.
            return match stranger.stream.write(&reply) {
                Ok(REPLY_BYTES) => Examined::Unknown(stranger),
                _ => Examined::Foreign,
            };
        };
        let confirm: Result<&[u8; CONFIRM_BYTES], _> = confirm.try_into();
        match confirm
            .ok()
            .and_then(|confirm| talk.confirmed(&reply, confirm))
        {
            Some(address) => Examined::Rank(Proven {
                rank,
                address,
                stream: stranger.stream,
            }),
            None => Examined::Foreign,
        }
    }

    /// A proven connection to a lower rank, however often that takes: it may not listen yet.
    fn connect(&self, to: (u32, SocketAddr), own: SocketAddr) -> Result<TcpStream, Stop> {
        loop {
            match self.try_connect(to, own) {
                Err(Attempt::Again) => {
                    self.check()?;
                    thread::sleep(RETRY);
                }
                Err(Attempt::Over(stop)) => return Err(stop),
                Ok(stream) => return Ok(ready(stream)?),
            }
        }
    }

    fn try_connect(
        &self,
        (acceptor, address): (u32, SocketAddr),
        own: SocketAddr,
    ) -> Result<TcpStream, Attempt> {
        let mut stream = self.open(own.ip(), address)?;
        let hello = hello(self.seat.rank, random().map_err(Stop::Failed)?);
        let talk = Talk {
            key: &self.key,
            hello: &hello,
            acceptor,
        };
        stream.write_all(&hello).map_err(|_| Attempt::Again)?;
        let mut reply = [0; REPLY_BYTES];
        self.read_once(&mut stream, &mut reply)?;
        // Whoever listens there now is not of this group.
        let confirm = talk.confirm(&reply, own).ok_or(Attempt::Again)?;
        stream.write_all(&confirm).map_err(|_| Attempt::Again)?;
        Ok(stream)
    }

    /// A connection from this address, made without blocking.
    fn open(&self, from: IpAddr, to: SocketAddr) -> Result<TcpStream, Attempt> {
        let again = |_| Attempt::Again;
        let family = if to.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = net::socket_with(family, SocketType::STREAM, flags, None).map_err(again)?;
        net::bind(&socket, &SocketAddr::new(from, 0)).map_err(again)?;
        match net::connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(_) => return Err(Attempt::Again),
        }
        while !is_ready(&socket, PollFlags::OUT) {
            self.check()?;
        }
        match sockopt::socket_error(&socket) {
            Ok(Ok(())) => Ok(TcpStream::from(socket)),
            Ok(Err(_)) | Err(_) => Err(Attempt::Again),
        }
    }

    fn read(&self, stream: &mut TcpStream, bytes: &mut [u8]) -> Result<(), Stop> {
        match self.read_once(stream, bytes) {
            Ok(()) => Ok(()),
            Err(Attempt::Over(stop)) => Err(stop),
            // The rank has died, which is the coordinator's to notice.
            Err(Attempt::Again) => loop {
                self.check()?;
                thread::sleep(RETRY);
            },
        }
    }

    fn read_once(&self, stream: &mut TcpStream, bytes: &mut [u8]) -> Result<(), Attempt> {
        let mut filled = 0;
        while filled < bytes.len() {
            match stream.read(&mut bytes[filled..]) {
                Ok(count @ 1..) => filled += count,
                Err(e) if is_later(&e) => {
                    is_ready(&*stream, PollFlags::IN);
                }
                Ok(_) | Err(_) => return Err(Attempt::Again),
            }
            self.check()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Stop> {
        if self.seat.abort.is_aborted() {
            Err(Stop::Aborted)
        } else if clock::now() >= self.deadline {
            Err(Stop::Late)
        } else {
            Ok(())
        }
    }
}

/// What came of looking at a stranger.
enum Examined {
    Unknown(Stranger),
    Foreign,
    Rank(Proven),
}

/// What came of an attempt to connect.
#[derive(Debug)]
enum Attempt {
    /// It may work later.
    Again,
    Over(Stop),
}

impl From<Stop> for Attempt {
    fn from(stop: Stop) -> Self {
        Self::Over(stop)
    }
}

/// For collectives: small rounds leave at once.
fn ready(stream: TcpStream) -> Result<TcpStream, CommError> {
    stream.set_nodelay(true).map_err(|e| failed(&e))?;
    Ok(stream)
}

fn failed(error: &io::Error) -> CommError {
    CommError::Failed(format!("cannot use a socket: {error}"))
}

pub(super) fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Waits for one [`SLICE`] at most.
fn is_ready(socket: &impl AsFd, flags: PollFlags) -> bool {
    let mut sockets = [PollFd::new(socket, flags)];
    wait(&mut sockets)
}

/// Waits for one [`SLICE`] at most until one of `sockets` is ready. Errors show when it is used.
pub(super) fn wait(sockets: &mut [PollFd<'_>]) -> bool {
    let slice = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(SLICE.subsec_nanos()),
    };
    poll(sockets, Some(&slice)).is_ok_and(|ready| ready > 0)
}
