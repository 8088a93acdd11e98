//! Rounds over a connection between every two ranks.
//!
//! In a round each rank writes its values to all others and reads theirs, at the same time, so that no
//! full buffer can lock two ranks up. A closed connection counts as one on which nothing comes: the
//! round waits for the abort. What a round needs was allocated when the group was formed.
//!
//! Invariant: the frames of a round begin with the same bytes on every rank (tag, round, length), or
//! the round fails on whoever sees the difference.

use super::identity::{Identity, MAX_RANKS};
use super::join::{is_later, wait};
use crate::clock;
use crate::comm::rounds::{self, Rounds};
use crate::comm::{Abort, CommError};
use rustix::event::{PollFd, PollFlags};
use std::array;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Floats' worth of a frame's header: tag, round, length.
const HEADER: usize = 8;
const HEADER_BYTES: usize = HEADER * size_of::<f32>();

// Floats travel as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "ranks are little-endian");

/// One rank's connections.
#[derive(Debug)]
pub(super) struct Mesh {
    /// All ranks but this one, in order.
    peers: Vec<Peer>,
    rank: u32,
    world_size: u32,
    /// This rank's frame.
    frame: Vec<f32>,
    round: u64,
    abort: Abort,
    /// Without progress since the caller last took it.
    waited: Duration,
}

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    frame: Vec<f32>,
    /// Bytes of this round.
    sent: usize,
    received: usize,
    /// Closed or broken: nothing comes or goes any more.
    is_gone: bool,
}

impl Mesh {
    /// Of what [`super::join::join`] gave.
    pub(super) fn new(
        identity: &Identity,
        rank: u32,
        streams: Vec<Option<TcpStream>>,
        abort: Abort,
    ) -> Self {
        let frame = vec![0.0; HEADER + identity.piece_elements];
        let peer = |stream| Peer {
            stream,
            frame: frame.clone(),
            sent: 0,
            received: 0,
            is_gone: false,
        };
        Self {
            peers: streams.into_iter().flatten().map(peer).collect(),
            rank,
            world_size: identity.world_size,
            frame,
            round: 0,
            abort,
            waited: Duration::ZERO,
        }
    }

    /// Waits until a connection can go on, for a short while at most.
    fn wait(&mut self, bytes: usize) {
        let start = clock::now();
        let unfinished = || {
            let peers = self.peers.iter();
            peers.filter(|peer| !peer.is_gone && !peer.is_done(bytes))
        };
        let count = unfinished().count();
        if count == 0 {
            // Only closed connections are left. Nothing wakes this rank but its abort.
            wait(&mut []);
        } else {
            let mut next = unfinished();
            let mut last = None;
            let mut sockets: [PollFd<'_>; MAX_RANKS as usize] = array::from_fn(|_| {
                let peer = next.next().or(last).unwrap_or(&self.peers[0]);
                last = Some(peer);
                PollFd::new(&peer.stream, peer.wants(bytes))
            });
            wait(&mut sockets[..count]);
        }
        self.waited += clock::now().duration_since(start);
    }
}

impl Rounds for Mesh {
    type Parts<'a> = Parts<'a>;

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn piece_elements(&self) -> usize {
        self.frame.len() - HEADER
    }

    fn exchange(&mut self, tag: [u64; 2], values: &[f32]) -> Result<Parts<'_>, CommError> {
        let length = HEADER + values.len();
        let header = [tag[0], tag[1], self.round, values.len() as u64];
        bytemuck::cast_slice_mut(&mut self.frame[..HEADER])
            .copy_from_slice(bytemuck::bytes_of(&header));
        self.frame[HEADER..length].copy_from_slice(values);
        let bytes = length * size_of::<f32>();
        for peer in &mut self.peers {
            (peer.sent, peer.received) = (0, 0);
        }
        loop {
            if self.abort.is_aborted() {
                return Err(CommError::Aborted);
            }
            let frame = bytemuck::cast_slice(&self.frame[..length]);
            for peer in &mut self.peers {
                peer.go_on(frame)?;
            }
            if self.peers.iter().all(|peer| peer.is_done(bytes)) {
                break;
            }
            self.wait(bytes);
        }
        self.round += 1;
        Ok(Parts {
            mesh: self,
            elements: values.len(),
        })
    }

    fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

impl Peer {
    /// Writes and reads what can be without waiting. `frame` is this rank's.
    fn go_on(&mut self, frame: &[u8]) -> Result<(), CommError> {
        while !self.is_gone && self.sent < frame.len() {
            match self.stream.write(&frame[self.sent..]) {
                Ok(count @ 1..) => self.sent += count,
                Err(e) if is_later(&e) => break,
                Ok(_) | Err(_) => self.is_gone = true,
            }
        }
        while !self.is_gone && self.received < frame.len() {
            // The length is the peer's only once its header was compared.
            let header_is_whole = self.received >= HEADER_BYTES;
            let until = if header_is_whole {
                frame.len()
            } else {
                HEADER_BYTES
            };
            let theirs: &mut [u8] = bytemuck::cast_slice_mut(&mut self.frame);
            match self.stream.read(&mut theirs[self.received..until]) {
                Ok(count @ 1..) => self.received += count,
                Err(e) if is_later(&e) => break,
                Ok(_) | Err(_) => self.is_gone = true,
            }
            if !header_is_whole
                && self.received == HEADER_BYTES
                && theirs[..HEADER_BYTES] != frame[..HEADER_BYTES]
            {
                return Err(CommError::Failed(
                    "the ranks have diverged: another rank is in another collective".to_owned(),
                ));
            }
        }
        Ok(())
    }

    fn is_done(&self, bytes: usize) -> bool {
        self.sent == bytes && self.received == bytes
    }

    fn wants(&self, bytes: usize) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::OUT, self.sent < bytes);
        flags.set(PollFlags::IN, self.received < bytes);
        flags
    }
}

/// All ranks' values of one round.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    mesh: &'a Mesh,
    elements: usize,
}

impl rounds::Parts for Parts<'_> {
    fn of(&self, rank: u32) -> &[f32] {
        let (rank, own) = (rank as usize, self.mesh.rank as usize);
        let frame = match rank {
            _ if rank == own => &self.mesh.frame,
            _ => &self.mesh.peers[rank - usize::from(rank > own)].frame,
        };
        &frame[HEADER..HEADER + self.elements]
    }
}
