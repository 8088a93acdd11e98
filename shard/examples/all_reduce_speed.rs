//! Measures the all-reduce over shared memory between ranks on this machine's cores.
//!
//!     cargo run --release -p shard --example all_reduce_speed -- [--ranks N] [--bytes 8192,1048576]
//!
//! A line per size: median wall time and its spread, bytes summed per second, and the share of the bound: what the
//! same threads copy per second, each its own part, measured in the same run with the same size. Each rank is a thread here, which
//! changes nothing: the segment is mapped once for each of them.
//!
//! Invariant: all ranks make the same number of calls, so that none waits for another that has left.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "it measures and prints"
)]

use anyhow::{Context, Result, bail};
use shard::comm::shm::ShmComm;
use shard::comm::{Abort, Seat};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const JOIN_LIMIT: Duration = Duration::from_secs(10);
/// Calls before the clock runs.
const WARM_UP: u32 = 50;
/// Bytes that all measured calls of a size move together, at most.
const TOTAL_BYTES: usize = 2 << 30;
const CALLS: std::ops::RangeInclusive<usize> = 200..=5000;

struct Options {
    ranks: u32,
    bytes: Vec<usize>,
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("all_reduce_speed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options {
        ranks: 2,
        bytes: vec![8 << 10, 64 << 10, 1 << 20],
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--ranks" => options.ranks = value.parse()?,
            "--bytes" => {
                let sizes = value.split(',').map(str::parse);
                options.bytes = sizes.collect::<Result<_, _>>()?;
            }
            _ => bail!("{flag} is not known"),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<()> {
    println!("{} ranks over shared memory", options.ranks);
    println!(
        "{:>10}{:>12}{:>9}{:>10}  of the bound",
        "bytes", "median us", "spread", "GB/s"
    );
    for bytes in &options.bytes {
        let elements = (bytes / size_of::<f32>()).max(1);
        let sums = reduce(options.ranks, elements)?;
        let copies = copy(options.ranks, elements)?;
        let quarter = |times: &[f64], quarters: usize| times[quarters * (times.len() - 1) / 4];
        let median = quarter(&sums, 2);
        let spread = 50.0 * (quarter(&sums, 3) - quarter(&sums, 1)) / median;
        println!(
            "{bytes:>10}{:>12.2}{:>9}{:>10.2}{:>6.0} % of a copy",
            median * 1e6,
            format!("±{spread:.0} %"),
            *bytes as f64 / median / 1e9,
            100.0 * quarter(&copies, 2) / median
        );
    }
    Ok(())
}

fn calls(elements: usize) -> usize {
    (TOTAL_BYTES / (elements * size_of::<f32>())).clamp(*CALLS.start(), *CALLS.end())
}

/// Seconds of each call on rank 0, ascending.
fn reduce(ranks: u32, elements: usize) -> Result<Vec<f64>> {
    let id = ShmComm::make_id(ranks, elements)?;
    let abort = Abort::default();
    let rank_of = |rank: u32| {
        let seat = Seat {
            id: &id,
            rank,
            world_size: ranks,
            interface: None,
            limit: JOIN_LIMIT,
            abort: &abort,
        };
        let mut comm = ShmComm::join_group(&seat)?;
        let mut x = vec![1e-3f32; elements];
        let mut times = Vec::with_capacity(calls(elements));
        for call in 0..WARM_UP as usize + calls(elements) {
            // Sums of sums would overflow.
            x.fill(1e-3);
            let begun = Instant::now();
            comm.all_reduce(&mut x)?;
            if call >= WARM_UP as usize {
                times.push(begun.elapsed().as_secs_f64());
            }
        }
        anyhow::Ok(times)
    };
    on_all(ranks, rank_of)
}

/// What the same threads need to copy as much.
fn copy(ranks: u32, elements: usize) -> Result<Vec<f64>> {
    on_all(ranks, |_| {
        let from = vec![1e-3f32; elements];
        let mut to = vec![0.0f32; elements];
        let times = (0..calls(elements)).map(|_| {
            let begun = Instant::now();
            black_box(&mut to).copy_from_slice(black_box(&from));
            begun.elapsed().as_secs_f64()
        });
        Ok(times.collect())
    })
}

fn on_all(ranks: u32, of: impl Fn(u32) -> Result<Vec<f64>> + Sync) -> Result<Vec<f64>> {
    let mut all = std::thread::scope(|scope| {
        let of = &of;
        let threads = (0..ranks).map(|rank| scope.spawn(move || of(rank)));
        let threads: Vec<_> = threads.collect();
        let joined = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        joined
            .map(|times| times.unwrap_or_else(|_| bail!("a rank panicked")))
            .collect::<Result<Vec<_>>>()
    })?;
    let mut first = all.swap_remove(0);
    first.sort_by(f64::total_cmp);
    Ok(first)
}
