//! Groups over loopback: the bits of shared memory, strangers, deaths and aborts.

use super::*;
use crate::clock;
use crate::comm::Abort;
use crate::comm::shm::ShmComm;
use crate::testing::Random;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);
const HOME: Option<IpAddr> = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));

fn now() -> Instant {
    clock::now()
}

fn backend() -> CpuBackend {
    CpuBackend::new(1, None).unwrap()
}

fn seat<'a>(id: &'a [u8], (rank, world_size): (u32, u32), abort: &'a Abort) -> Seat<'a> {
    Seat {
        id,
        rank,
        world_size,
        interface: HOME,
        limit: LIMIT,
        abort,
    }
}

/// Runs `work` on every rank of a group, one thread each, and returns what each gave.
fn on_ranks<C: Comm<CpuBackend>, T: Send>(
    world_size: u32,
    max_elements: usize,
    abort: &Abort,
    work: impl Fn(u32, &mut C) -> T + Sync,
) -> Vec<T> {
    let id = C::new_id(world_size, max_elements, HOME).unwrap();
    let (id, work) = (&id, &work);
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let seat = seat(id, (rank, world_size), abort);
                    work(rank, &mut C::join(&backend(), &seat).unwrap())
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn values(seed: u64, rank: u32, length: usize) -> Vec<f32> {
    let mut random = Random::new(seed ^ u64::from(rank) << 32);
    // Magnitudes far apart, so that another order of adding gives other bits.
    let mut value = || {
        let float = random.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0;
        float * [1e-4, 1e-2, 1.0, 1e3, 1e5][random.below(5)]
    };
    (0..length).map(|_| value()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn bits_are_those_of_shared_memory() {
    let seed = Random::seed("tcp");
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for world_size in [1u32, 2, 3, 4, 8] {
        // A small piece, so that most lengths need several and some none.
        let mut lengths: Vec<usize> = (0..12).map(|_| random.below(400)).collect();
        lengths.extend([0, 1, 64]);
        let work = |rank: u32, reduce: &mut dyn FnMut(&mut [f32]), gather: &mut Gather<'_>| {
            let mut all = Vec::new();
            for (i, length) in lengths.iter().enumerate() {
                let mut x = values(seed + i as u64, rank, *length);
                let mut out = vec![0.0; 7 * length * world_size as usize];
                gather(&values(seed ^ i as u64, rank, 7 * length), 7, &mut out);
                reduce(&mut x);
                all.extend(bits(&x));
                all.extend(bits(&out));
            }
            all
        };
        let over_tcp = on_ranks(
            world_size,
            64,
            &Abort::default(),
            |rank, comm: &mut TcpComm| {
                let comm = std::cell::RefCell::new(comm);
                work(
                    rank,
                    &mut |x| comm.borrow_mut().all_reduce(x).unwrap(),
                    &mut |part, width, out| {
                        comm.borrow_mut().all_gather_rows(part, width, out).unwrap();
                    },
                )
            },
        );
        let shared = on_ranks(
            world_size,
            64,
            &Abort::default(),
            |rank, comm: &mut ShmComm| {
                let comm = std::cell::RefCell::new(comm);
                work(
                    rank,
                    &mut |x| comm.borrow_mut().all_reduce(x).unwrap(),
                    &mut |part, width, out| {
                        comm.borrow_mut().all_gather_rows(part, width, out).unwrap();
                    },
                )
            },
        );
        assert_eq!(over_tcp, shared, "{world_size} ranks");
    }
}

type Gather<'a> = dyn FnMut(&[f32], usize, &mut [f32]) + 'a;

#[test]
fn frames_larger_than_any_buffer_do_not_lock_ranks_up() {
    // 16 MiB to each of two others, while both do the same.
    let sums = on_ranks(3, 1 << 16, &Abort::default(), |rank, comm: &mut TcpComm| {
        let mut x = vec![rank as f32 + 1.0; 4 << 20];
        comm.all_reduce(&mut x).unwrap();
        x.iter().all(|sum| sum.to_bits() == 6f32.to_bits())
    });
    assert_eq!(sums, [true; 3]);
}

#[test]
fn strangers_are_dropped_and_hold_up_nobody() {
    let id = TcpComm::new_id(3, 64, HOME).unwrap();
    let address = Identity::from_bytes(&id).unwrap().address;
    assert!(address.ip().is_loopback());
    // Silent, talkative, and one that speaks the protocol without the key.
    let silent: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let mut talkative = TcpStream::connect(address).unwrap();
    talkative.write_all(&[b'x'; 4000]).unwrap();
    let mut clever = TcpStream::connect(address).unwrap();
    clever.write_all(&proof::hello(1, [5; 32])).unwrap();
    let abort = Abort::default();
    let begun = now();
    thread::scope(|scope| {
        for rank in 0..3 {
            let (id, abort) = (&id, &abort);
            scope.spawn(move || {
                let mut comm = TcpComm::join(&backend(), &seat(id, (rank, 3), abort)).unwrap();
                let mut x = [1.0; 10];
                comm.all_reduce(&mut x).unwrap();
                assert_eq!(bits(&x), bits(&[3.0; 10]));
            });
        }
        clever.read_exact(&mut [0; proof::REPLY_BYTES]).unwrap();
        clever.write_all(&[0; proof::CONFIRM_BYTES]).unwrap();
    });
    assert!(
        now().duration_since(begun) < Duration::from_secs(4),
        "held up"
    );
    drop(silent);
    let refused = TcpStream::connect(address);
    assert!(refused.is_err(), "nobody listens once the group is formed");
}

#[test]
fn another_groups_rank_is_a_stranger() {
    let (ours, theirs) = (TcpComm::new_id(2, 64, HOME), TcpComm::new_id(2, 64, HOME));
    let ours = ours.unwrap();
    // The same place, another key.
    let mut mixed = Identity::from_bytes(&theirs.unwrap()).unwrap().to_bytes();
    mixed[48..].copy_from_slice(&ours[48..]);
    let limit = Duration::from_millis(500);
    let abort = Abort::default();
    thread::scope(|scope| {
        for (rank, id) in [(0, &ours), (1, &mixed)] {
            let abort = &abort;
            scope.spawn(move || {
                let seat = Seat {
                    limit,
                    ..seat(id, (rank, 2), abort)
                };
                let error = TcpComm::join(&backend(), &seat).unwrap_err();
                assert!(
                    matches!(error, CommError::Incomplete { joined: 1, .. }),
                    "{error}"
                );
            });
        }
    });
}

#[test]
fn an_abort_ends_joining_and_collectives_and_a_death_ends_nothing() {
    let abort = Abort::default();
    let id = TcpComm::new_id(2, 64, HOME).unwrap();
    let end_soon = |after: u64| {
        let abort = abort.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(after));
            abort.abort();
            now()
        })
    };
    let aborted = end_soon(100);
    let error = TcpComm::join(&backend(), &seat(&id, (0, 2), &abort)).unwrap_err();
    let late = now().duration_since(aborted.join().unwrap());
    assert!(matches!(error, CommError::Aborted) && late < Duration::from_millis(250));

    // Rank 1 dies: rank 0 stays where it is until it is told to leave.
    let abort = Abort::default();
    let begun = now();
    let results = on_ranks(2, 64, &abort, |rank, comm: &mut TcpComm| {
        comm.all_reduce(&mut [1.0; 100]).unwrap();
        if rank == 1 {
            return None;
        }
        let abort = abort.clone();
        let aborting = thread::spawn(move || {
            thread::sleep(Duration::from_millis(400));
            abort.abort();
            now()
        });
        let result = comm.all_reduce(&mut [1.0; 100]);
        let late = now().duration_since(aborting.join().unwrap());
        Some((result.map_err(|e| e.to_string()), late))
    });
    let (result, late) = results[0].clone().unwrap();
    assert_eq!(result, Err(CommError::Aborted.to_string()));
    assert!(late < Duration::from_millis(250), "{late:?}");
    assert!(now().duration_since(begun) >= Duration::from_millis(400));
}

#[test]
fn ranks_that_have_diverged_fail_instead_of_adding_up() {
    for lengths in [[8, 8], [8, 9]] {
        let abort = Abort::default();
        let results = on_ranks(2, 64, &abort, |rank, comm: &mut TcpComm| {
            if lengths[0] == lengths[1] {
                comm.begin_step([u8::try_from(rank).unwrap(); 16]);
            }
            let mut x = vec![1.0; lengths[rank as usize]];
            let result = comm.all_reduce(&mut x).map_err(|e| e.to_string());
            // Kept open: each rank sees the difference for itself.
            thread::sleep(Duration::from_millis(100));
            result
        });
        let diverged = |r: &Result<(), String>| r.as_ref().is_err_and(|e| e.contains("diverged"));
        assert!(results.iter().all(diverged), "{results:?}");
    }
}

#[test]
fn a_foreign_identity_is_refused_and_a_discarded_one_is_gone() {
    let id = TcpComm::new_id(2, 64, HOME).unwrap();
    let abort = Abort::default();
    let refused = |id: &[u8], rank, world_size| {
        let error = TcpComm::join(&backend(), &seat(id, (rank, world_size), &abort)).unwrap_err();
        assert!(matches!(error, CommError::Failed(_)), "{error}");
    };
    refused(&id, 0, 3);
    refused(&id, 2, 2);
    refused(&id[1..], 0, 2);
    refused(&[], 1, 2);
    let address = Identity::from_bytes(&id).unwrap().address;
    TcpComm::discard_id(&id);
    refused(&id, 0, 2);
    assert!(TcpStream::connect(address).is_err());
    let far: IpAddr = "192.0.2.1".parse().unwrap();
    let error = TcpComm::new_id(2, 64, Some(far)).unwrap_err().to_string();
    assert!(error.contains("cannot listen on 192.0.2.1"), "{error}");
}
