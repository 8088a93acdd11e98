//! Collectives between CPU ranks on several hosts, over TCP.
//!
//! The same arithmetic as over shared memory (`rounds`), hence the same bits. Ranks find each
//! other with `join`, prove with `proof` that they belong together, and exchange over `mesh`.
//! Values travel in clear; who may take part is what the key decides. A dead peer is not noticed here;
//! only an abort ends a wait.
//!
//! Invariant: a rank reads values only from connections that have proven the group's key.

mod identity;
mod join;
mod mesh;
mod proof;
#[cfg(test)]
mod tests;

use super::rounds::Member;
use super::{Comm, CommError, CommTimings, Seat};
use identity::Identity;
use kernels::cpu::{CpuBackend, CpuTensor};
use mesh::Mesh;
use std::net::IpAddr;

/// One rank's end of a group over TCP. With one rank it is nothing and costs nothing.
#[derive(Debug)]
pub struct TcpComm(Member<Mesh>);

impl TcpComm {
    /// `x = sum over ranks of x`, in rank order. All ranks pass the same length.
    ///
    /// # Errors
    /// [`CommError`]; the group is of no use afterwards.
    pub fn all_reduce(&mut self, x: &mut [f32]) -> Result<(), CommError> {
        self.0.all_reduce(x)
    }

    /// `out[row] = part_0[row] ++ part_1[row] ++ …` for rows of `width` elements: `part: [rows, width]`,
    /// `out: [rows, world_size * width]`.
    ///
    /// # Errors
    /// [`CommError`]; the group is of no use afterwards.
    pub fn all_gather_rows(
        &mut self,
        part: &[f32],
        width: usize,
        out: &mut [f32],
    ) -> Result<(), CommError> {
        self.0.all_gather_rows((part, width), out)
    }
}

impl Comm<CpuBackend> for TcpComm {
    fn new_id(
        world_size: u32,
        max_elements: usize,
        interface: Option<IpAddr>,
    ) -> Result<Vec<u8>, CommError> {
        if world_size == 1 {
            return Ok(Vec::new());
        }
        let missing = "rank 0 was not told its address on the network between the hosts";
        let interface = interface.ok_or_else(|| CommError::Failed(missing.to_owned()))?;
        Ok(Identity::make(world_size, max_elements, interface)?.to_bytes())
    }

    fn discard_id(id: &[u8]) {
        if let Ok(identity) = Identity::from_bytes(id) {
            drop(identity.take_listener());
        }
    }

    fn join(_: &CpuBackend, seat: &Seat<'_>) -> Result<Self, CommError> {
        if seat.world_size == 1 {
            return Ok(Self(Member::new(None, seat.abort)));
        }
        let identity = Identity::from_bytes(seat.id)?;
        if identity.world_size != seat.world_size || seat.rank >= seat.world_size {
            return Err(CommError::Failed(format!(
                "the communicator is for {} ranks; this is rank {} of {}",
                identity.world_size, seat.rank, seat.world_size
            )));
        }
        let streams = join::join(&identity, seat)?;
        let mesh = Mesh::new(&identity, seat.rank, streams, seat.abort.clone());
        Ok(Self(Member::new(Some(mesh), seat.abort)))
    }

    fn world_size(&self) -> u32 {
        self.0.world_size()
    }

    fn begin_step(&mut self, digest: [u8; 16]) {
        self.0.set_tag(digest);
    }

    fn all_reduce_sum(&mut self, _: &CpuBackend, x: &mut CpuTensor) -> Result<(), CommError> {
        self.all_reduce(x.values_mut())
    }

    fn all_gather(
        &mut self,
        _: &CpuBackend,
        part: &CpuTensor,
        out: &mut CpuTensor,
    ) -> Result<(), CommError> {
        self.all_gather_rows(part.values(), part.width(), out.values_mut())
    }

    fn take_timings(&mut self) -> CommTimings {
        self.0.take_timings()
    }
}
