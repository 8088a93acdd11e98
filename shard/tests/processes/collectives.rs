//! All-reduce and all-gather between processes.

use crate::testing::Random;
use shard::comm::shm::ShmComm;
use shard::comm::{Abort, Seat};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

const ROUNDS: usize = 300;
/// Small slots, so that most tensors go in pieces.
const MAX_ELEMENTS: usize = 500;

pub(crate) fn sums_are_the_same_in_all_processes() {
    for world_size in [2, 4, 8] {
        let id = ShmComm::make_id(world_size, MAX_ELEMENTS).expect("shared memory can be had");
        let id = id.iter().map(u8::to_string).collect::<Vec<_>>().join(",");
        let program = std::env::current_exe().expect("this program has a path");
        let children: Vec<_> = (0..world_size)
            .map(|rank| {
                Command::new(&program)
                    .args([
                        "collectives",
                        &id,
                        &rank.to_string(),
                        &world_size.to_string(),
                    ])
                    .stdout(Stdio::piped())
                    .spawn()
                    .expect("this program starts")
            })
            .collect();
        let outputs: Vec<_> = children
            .into_iter()
            .map(|child| child.wait_with_output().expect("the child ends"))
            .collect();
        for output in &outputs {
            assert!(output.status.success());
            assert_eq!(output.stdout.len(), 17, "a hash and a newline");
            assert_eq!(output.stdout, outputs[0].stdout, "{world_size} processes");
        }
    }
}

/// One rank: prints a hash over the bits of everything it got.
#[expect(clippy::print_stdout, reason = "read by the parent")]
pub(crate) fn child(arguments: &[String]) -> ExitCode {
    let [id, rank, world_size] = arguments else {
        return ExitCode::FAILURE;
    };
    let id: Vec<u8> = id
        .split(',')
        .map(|byte| byte.parse().expect("a byte"))
        .collect();
    let rank: u32 = rank.parse().expect("a rank");
    let world_size: u32 = world_size.parse().expect("a world size");
    let limit = Duration::from_secs(60);
    let seat = Seat {
        id: &id,
        rank,
        world_size,
        interface: None,
        limit,
        abort: &Abort::default(),
    };
    let mut comm = ShmComm::join_group(&seat).expect("all ranks join");

    // All ranks draw the same lengths and each its own values.
    let seed = Random::seed("collectives");
    let mut lengths = Random::new(seed);
    let mut values = Random::new(seed + 1 + u64::from(rank));
    let mut hash = 0u64;
    let mut absorb = |values: &[f32]| {
        for value in values {
            hash = (hash ^ u64::from(value.to_bits()))
                .wrapping_mul(0x0100_0000_01b3)
                .rotate_left(7);
        }
    };
    for _ in 0..ROUNDS {
        let length = lengths.below(3 * MAX_ELEMENTS);
        let mut value = || values.below(1 << 24) as f32 * [1e-6, 1.0, 1e4][values.below(3)];
        let mut x: Vec<f32> = (0..length).map(|_| value()).collect();
        comm.all_reduce(&mut x).expect("the sum");
        absorb(&x);
        let width = 1 + lengths.below(40);
        let part: Vec<f32> = (0..3 * width).map(|_| value()).collect();
        let mut out = vec![0.0; part.len() * world_size as usize];
        comm.all_gather_rows(&part, width, &mut out)
            .expect("the rows");
        absorb(&out);
    }
    println!("{hash:016x}");
    ExitCode::SUCCESS
}
