//! Collectives between the processes of one host, through shared memory.
//!
//! The arithmetic is `rounds`', shared with TCP; the memory and how values are shown in it are
//! `segment`'s. A dead peer is not noticed here; only an abort ends a wait.
//!
//! Invariant: no process of another host can take part, and no memory outlives the group.

mod segment;

use super::rounds::Member;
use super::{Comm, CommError, CommTimings, Seat};
use kernels::cpu::{CpuBackend, CpuTensor};
use segment::{Identity, Segment};
use std::net::IpAddr;

/// One rank's end of a group of processes on one host. With one rank it is nothing and costs nothing.
#[derive(Debug)]
pub struct ShmComm(Member<Segment>);

impl ShmComm {
    /// Makes the shared memory for a group and returns its identity: opaque bytes that every rank,
    /// the maker included, needs for [`Self::join_group`]. Tensors above `max_elements` go in pieces.
    ///
    /// # Errors
    /// [`CommError::Failed`] if there is no room in `/dev/shm`.
    pub fn make_id(world_size: u32, max_elements: usize) -> Result<Vec<u8>, CommError> {
        if world_size == 1 {
            return Ok(Vec::new());
        }
        Identity::make(world_size, max_elements).map(|identity| identity.to_bytes().to_vec())
    }

    /// Removes what [`Self::make_id`] made if the group was never formed. Harmless afterwards.
    pub fn discard(id: &[u8]) {
        if let Ok(identity) = Identity::from_bytes(id) {
            identity.unlink();
        }
    }

    /// Attaches to the group and waits for all its ranks.
    ///
    /// # Errors
    /// [`CommError::Incomplete`] if some do not come within the seat's limit, [`CommError::Aborted`],
    /// [`CommError::Failed`] if the identity is not that of a group of this size on this host.
    pub fn join_group(seat: &Seat<'_>) -> Result<Self, CommError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::join_on(cores, seat)
    }

    /// The same where the ranks share so many cores, of which the calling thread may be confined to some.
    fn join_on(cores: usize, seat: &Seat<'_>) -> Result<Self, CommError> {
        if seat.world_size == 1 {
            return Ok(Self(Member::new(None, seat.abort)));
        }
        let identity = Identity::from_bytes(seat.id)?;
        if identity.world_size() != seat.world_size {
            return Err(CommError::Failed(format!(
                "the communicator is for {} ranks, this group has {}",
                identity.world_size(),
                seat.world_size
            )));
        }
        let segment = Segment::join(identity, seat, cores)?;
        Ok(Self(Member::new(Some(segment), seat.abort)))
    }

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

    /// Time inside collectives since the last call.
    pub fn timings(&mut self) -> CommTimings {
        self.0.take_timings()
    }

    /// Names the plan being computed: ranks with different ones fail instead of adding up.
    pub fn set_tag(&mut self, tag: [u8; 16]) {
        self.0.set_tag(tag);
    }
}

impl Comm<CpuBackend> for ShmComm {
    /// Everybody is on this host: no interface is needed.
    fn new_id(
        world_size: u32,
        max_elements: usize,
        _: Option<IpAddr>,
    ) -> Result<Vec<u8>, CommError> {
        Self::make_id(world_size, max_elements)
    }

    fn discard_id(id: &[u8]) {
        Self::discard(id);
    }

    fn join(cpu: &CpuBackend, seat: &Seat<'_>) -> Result<Self, CommError> {
        Self::join_on(cpu.host_cores(), seat)
    }

    fn world_size(&self) -> u32 {
        self.0.world_size()
    }

    fn begin_step(&mut self, digest: [u8; 16]) {
        self.set_tag(digest);
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
        self.timings()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::comm::Abort;
    use crate::testing::Random;
    use std::path::PathBuf;
    use std::thread;
    use std::time::{Duration, Instant};

    const LIMIT: Duration = Duration::from_secs(20);

    /// Runs `work` on every rank of a group, one thread each, and returns what each gave.
    fn on_ranks<T: Send>(
        world_size: u32,
        max_elements: usize,
        abort: &Abort,
        work: impl Fn(u32, &mut ShmComm) -> T + Sync,
    ) -> Vec<T> {
        let id = ShmComm::make_id(world_size, max_elements).unwrap();
        let (id, work) = (&id, &work);
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size)
                .map(|rank| {
                    scope.spawn(move || {
                        let seat = Seat {
                            id,
                            rank,
                            world_size,
                            interface: None,
                            limit: LIMIT,
                            abort,
                        };
                        work(rank, &mut ShmComm::join_group(&seat).unwrap())
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn values(seed: u64, rank: u32, length: usize) -> Vec<f32> {
        let mut random = Random::new(seed ^ u64::from(rank) << 32);
        // Magnitudes far apart, so that another order of adding gives other bits.
        (0..length)
            .map(|_| float(&mut random) * [1e-4, 1e-2, 1.0, 1e3, 1e5][random.below(5)])
            .collect()
    }

    /// Between -1 and 1.
    fn float(random: &mut Random) -> f32 {
        random.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    fn file_of(id: &[u8]) -> PathBuf {
        Identity::from_bytes(id).unwrap().path()
    }

    #[test]
    fn sums_are_in_rank_order_and_the_same_on_all_ranks() {
        let seed = Random::seed("sums");
        println!("seed {seed}");
        let mut random = Random::new(seed);
        for world_size in [1, 2, 3, 4, 8] {
            // A small slot, so that most lengths need several pieces and some none.
            let lengths: Vec<usize> = (0..25)
                .map(|_| random.below(400))
                .chain([0, 1, 64])
                .collect();
            let sums = on_ranks(world_size, 64, &Abort::default(), |rank, comm| {
                let reduce = |(i, length): (usize, &usize)| {
                    let mut x = values(seed + i as u64, rank, *length);
                    comm.all_reduce(&mut x).unwrap();
                    x
                };
                lengths.iter().enumerate().map(reduce).collect::<Vec<_>>()
            });
            for (i, length) in lengths.iter().enumerate() {
                let mut expected = values(seed + i as u64, 0, *length);
                for rank in 1..world_size {
                    let part = values(seed + i as u64, rank, *length);
                    expected.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
                for sum in &sums {
                    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(
                        bits(&sum[i]),
                        bits(&expected),
                        "{world_size} ranks, {length}"
                    );
                }
            }
        }
    }

    #[test]
    fn gathers_rows_of_any_shape() {
        let seed = Random::seed("gathers");
        println!("seed {seed}");
        let mut random = Random::new(seed);
        for world_size in [1u32, 2, 3, 8] {
            for case in 0..15 {
                let (rows, width) = (random.below(9), 1 + random.below(150));
                let outs = on_ranks(world_size, 50, &Abort::default(), |rank, comm| {
                    let part = values(seed + case, rank, rows * width);
                    let mut out = vec![0.0; part.len() * world_size as usize];
                    comm.all_gather_rows(&part, width, &mut out).unwrap();
                    out
                });
                let parts: Vec<_> = (0..world_size)
                    .map(|r| values(seed + case, r, rows * width))
                    .collect();
                let mut expected = Vec::new();
                for row in 0..rows {
                    for part in &parts {
                        expected.extend_from_slice(&part[row * width..(row + 1) * width]);
                    }
                }
                for out in outs {
                    assert_eq!(out, expected, "{world_size} ranks, {rows} rows of {width}");
                }
            }
        }
    }

    #[test]
    fn abort_ends_a_collective_that_waits_for_a_rank_that_never_comes() {
        let abort = Abort::default();
        let started = &std::sync::Barrier::new(3);
        let late = thread::scope(|scope| {
            let aborting = scope.spawn(|| {
                started.wait();
                thread::sleep(Duration::from_millis(50));
                abort.abort();
                clock::now()
            });
            let ends = on_ranks(3, 64, &abort, |rank, comm| {
                if rank == 2 {
                    return None;
                }
                started.wait();
                let result = comm.all_reduce(&mut [1.0; 100]);
                assert!(matches!(result, Err(CommError::Aborted)), "{result:?}");
                let again = comm.all_reduce(&mut [1.0; 100]);
                assert!(matches!(again, Err(CommError::Aborted)), "{again:?}");
                Some(clock::now())
            });
            let aborted: Instant = aborting.join().unwrap();
            let latest = ends.into_iter().flatten().max().unwrap();
            latest.duration_since(aborted)
        });
        assert!(
            late < Duration::from_millis(250),
            "left {late:?} after the abort"
        );
    }

    #[test]
    fn a_group_that_stays_incomplete_says_so_and_leaves_nothing() {
        let id = ShmComm::make_id(3, 64).unwrap();
        assert!(file_of(&id).exists());
        let limit = Duration::from_millis(100);
        let abort = &Abort::default();
        let join = |rank| {
            let id = &id;
            move || {
                ShmComm::join_group(&Seat {
                    id,
                    rank,
                    world_size: 3,
                    interface: None,
                    limit,
                    abort,
                })
            }
        };
        let errors = thread::scope(|scope| {
            [scope.spawn(join(0)), scope.spawn(join(2))]
                .map(|rank| rank.join().unwrap().unwrap_err().to_string())
        });
        for error in errors {
            assert_eq!(
                error,
                "only 2 of 3 ranks joined the communicator within 0.1s"
            );
        }
        assert!(!file_of(&id).exists());
    }

    #[test]
    fn the_file_is_gone_once_all_are_attached() {
        let id = ShmComm::make_id(2, 64).unwrap();
        let abort = &Abort::default();
        thread::scope(|scope| {
            for rank in 0..2 {
                let id = &id;
                scope.spawn(move || {
                    let seat = Seat {
                        id,
                        rank,
                        world_size: 2,
                        interface: None,
                        limit: LIMIT,
                        abort,
                    };
                    let comm = ShmComm::join_group(&seat).unwrap();
                    assert!(!file_of(id).exists());
                    drop(comm);
                });
            }
        });
        let unused = ShmComm::make_id(2, 64).unwrap();
        ShmComm::discard(&unused);
        assert!(!file_of(&unused).exists());
    }

    #[test]
    fn ranks_that_have_diverged_fail_instead_of_adding_up() {
        let results = on_ranks(2, 64, &Abort::default(), |rank, comm| {
            comm.set_tag([u8::try_from(rank).unwrap(); 16]);
            comm.all_reduce(&mut [1.0; 8]).map_err(|e| e.to_string())
        });
        assert!(
            results
                .iter()
                .all(|r| r.as_ref().is_err_and(|e| e.contains("diverged")))
        );
        let results = on_ranks(2, 64, &Abort::default(), |rank, comm| {
            comm.all_reduce(&mut vec![1.0; 8 + rank as usize])
                .map_err(|e| e.to_string())
        });
        assert!(
            results
                .iter()
                .all(|r| r.as_ref().is_err_and(|e| e.contains("diverged")))
        );
    }

    #[test]
    fn a_foreign_identity_is_refused() {
        let id = ShmComm::make_id(2, 64).unwrap();
        let abort = Abort::default();
        let refused = |id: &[u8], rank, world_size| {
            let seat = Seat {
                id,
                rank,
                world_size,
                interface: None,
                limit: LIMIT,
                abort: &abort,
            };
            let error = ShmComm::join_group(&seat).unwrap_err();
            assert!(matches!(error, CommError::Failed(_)), "{error}");
        };
        refused(&id, 0, 3);
        refused(&id[1..], 0, 2);
        for byte in [0, 24, 30, 35] {
            let mut other = id.clone();
            other[byte] ^= 0x40;
            refused(&other, 0, 2);
        }
        // Too high a rank; and whoever fails to join has unlinked the file for all.
        refused(&id, 2, 2);
        refused(&id, 0, 2);
    }
}
