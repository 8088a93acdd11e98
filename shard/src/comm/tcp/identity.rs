//! What makes a group over TCP one group: where rank 0 listens, and the key that its ranks share.
//!
//! Travels from rank 0 through the coordinator to the other ranks, over links that are encrypted and
//! admit only processes of this launch. Whoever has the key is a rank; nobody else is. The listening
//! socket exists from [`Identity::make`] on, so that ranks may come before rank 0 takes its seat.
//!
//! Invariant: a key serves one group and is shown to nobody; an identity that nobody joins holds a
//! socket until it is discarded.

use crate::comm::CommError;
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a secret key, of a nonce and of a proof.
pub(super) const KEY_BYTES: usize = 32;
/// Bytes of an address: IPv6 (or IPv4 mapped into it), port.
pub(super) const ADDRESS_BYTES: usize = 18;
/// Bytes of an identity: magic, key, world size, piece, address.
const IDENTITY_BYTES: usize = 8 + KEY_BYTES + 4 + 4 + ADDRESS_BYTES;
const MAGIC: [u8; 8] = *b"cltcp\0\0\x01";

/// Ranks of one group; more is a mistake in a message rather than a cluster.
pub(super) const MAX_RANKS: u32 = 64;
/// Most elements of a round: 256 KiB fill a network's pipe, larger tensors go in pieces.
const MAX_PIECE_ELEMENTS: usize = 64 << 10;

/// Sockets of identities that were made here and not joined yet. The trait's `new_id` and `join` have
/// nothing else in common but the process.
static LISTENERS: Mutex<Vec<([u8; KEY_BYTES], TcpListener)>> = Mutex::new(Vec::new());

fn listeners() -> MutexGuard<'static, Vec<([u8; KEY_BYTES], TcpListener)>> {
    LISTENERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One group.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Identity {
    key: [u8; KEY_BYTES],
    pub(super) world_size: u32,
    pub(super) piece_elements: usize,
    /// Rank 0's.
    pub(super) address: SocketAddr,
}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("world_size", &self.world_size)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Listens on `interface` for the other ranks.
    pub(super) fn make(
        world_size: u32,
        max_elements: usize,
        interface: IpAddr,
    ) -> Result<Self, CommError> {
        check_world_size(world_size)?;
        let listener = listen(interface)?;
        let address = listener
            .local_addr()
            .map_err(|e| CommError::Failed(e.to_string()))?;
        let identity = Self {
            key: random()?,
            world_size,
            piece_elements: max_elements.clamp(1, MAX_PIECE_ELEMENTS),
            address,
        };
        listeners().push((identity.key, listener));
        Ok(identity)
    }

    /// The socket of an identity that was made by this process, once.
    pub(super) fn take_listener(&self) -> Option<TcpListener> {
        let mut listeners = listeners();
        let place = listeners.iter().position(|(key, _)| *key == self.key)?;
        Some(listeners.swap_remove(place).1)
    }

    /// The group's key, for proofs.
    pub(super) fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.key)
    }

    /// For the wire.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let piece = u32::try_from(self.piece_elements).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(IDENTITY_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.key);
        bytes.extend(self.world_size.to_le_bytes());
        bytes.extend(piece.to_le_bytes());
        bytes.extend(address_to_bytes(self.address));
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote, with its limits.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, CommError> {
        let malformed = || CommError::Failed("the communicator's identity is malformed".to_owned());
        let whole = bytes.len() == IDENTITY_BYTES && bytes.starts_with(&MAGIC);
        let mut rest = bytes.get(MAGIC.len()..).filter(|_| whole);
        let rest = rest.as_mut().ok_or_else(malformed)?;
        let identity = Self {
            key: take(rest).ok_or_else(malformed)?,
            world_size: u32::from_le_bytes(take(rest).ok_or_else(malformed)?),
            piece_elements: u32::from_le_bytes(take(rest).ok_or_else(malformed)?) as usize,
            address: address_from_bytes(take(rest).ok_or_else(malformed)?),
        };
        check_world_size(identity.world_size)?;
        if (1..=MAX_PIECE_ELEMENTS).contains(&identity.piece_elements) {
            Ok(identity)
        } else {
            Err(malformed())
        }
    }
}

/// The next `N` bytes.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*first)
}

/// A socket on this address only, on a port that the system chooses.
pub(super) fn listen(interface: IpAddr) -> Result<TcpListener, CommError> {
    let listening = TcpListener::bind((interface, 0)).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listening.map_err(|e| {
        CommError::Failed(format!(
            "cannot listen on {interface} for the other ranks: {e}; it must be an address of this \
             node (`address` in the topology file)"
        ))
    })
}

/// Bytes that nobody can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N], CommError> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| CommError::Failed("the system gives no randomness".to_owned()))?;
    Ok(bytes)
}

pub(super) fn address_to_bytes(address: SocketAddr) -> [u8; ADDRESS_BYTES] {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&address.port().to_le_bytes());
    bytes
}

pub(super) fn address_from_bytes(bytes: [u8; ADDRESS_BYTES]) -> SocketAddr {
    let mut ip = [0; 16];
    ip.copy_from_slice(&bytes[..16]);
    let ip = Ipv6Addr::from(ip).to_canonical();
    SocketAddr::new(ip, u16::from_le_bytes([bytes[16], bytes[17]]))
}

fn check_world_size(world_size: u32) -> Result<(), CommError> {
    if (2..=MAX_RANKS).contains(&world_size) {
        Ok(())
    } else {
        Err(CommError::Failed(format!(
            "a communicator over TCP has 2 to {MAX_RANKS} ranks, not {world_size}"
        )))
    }
}
