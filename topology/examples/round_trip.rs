//! Measures the link over loopback: a plan out, a short answer back.
//!
//! `cargo run --release -p topology --example round_trip` prints the median and the slowest
//! hundredth for plans of several sizes, to one shard and to four at once. All ends are in one process, on one
//! runtime, so that the figures are those of the link and not of the operating system's scheduler.

#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use anyhow::Result;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use topology::ids::{BlockId, Epoch, Rank};
use topology::link::{Admitted, Frame, Identity, Listener, broadcast, connect};
use topology::wire::{FromShard, Hello, PlanRow, StepPlan, ToShard};

const LIMIT: Duration = Duration::from_secs(10);
const ROUNDS: usize = 2000;

#[tokio::main]
async fn main() -> Result<()> {
    println!(
        "{:>6} {:>7} {:>9}  {:>9} {:>9}",
        "ranks", "rows", "bytes", "p50", "p99"
    );
    for ranks in [1, 4] {
        let mut links = links(ranks).await?;
        for (rows, context) in [(1, 16), (16, 512), (64, 2048), (256, 4096)] {
            let plan = plan(rows, context);
            let frame = Frame::new(&plan)?;
            let bytes = topology::wire::encode(&plan)?.len();
            let mut times = Vec::with_capacity(ROUNDS);
            for _ in 0..ROUNDS {
                times.push(round(&mut links, &frame).await?);
            }
            times.sort_unstable();
            let (median, slow) = (times[ROUNDS / 2], times[ROUNDS * 99 / 100]);
            println!("{ranks:>6} {rows:>7} {bytes:>9}  {median:>9.1?} {slow:>9.1?}");
        }
    }
    Ok(())
}

/// Admitted links to shards that answer every plan at once.
async fn links(ranks: u32) -> Result<Vec<Admitted>> {
    let mut listener = Listener::bind(Ipv4Addr::LOCALHOST.into())?;
    let address = listener.local_addr()?;
    let mut links = Vec::new();
    for rank in (0..ranks).map(Rank) {
        let identity = Identity::generate()?;
        listener.expect(rank, identity.certificate().clone());
        let certificate = listener.certificate().clone();
        tokio::spawn(async move {
            let hello = Hello {
                rank,
                pid: std::process::id(),
                device: "none".to_owned(),
                free_bytes: 0,
                total_bytes: 0,
            };
            let link = connect(address, &certificate, &identity, hello, LIMIT).await;
            let mut link = link.expect("the listener expects it");
            while link.receiver.recv().await.is_ok() {
                let answer = FromShard::Joined { epoch: Epoch(1) };
                if link.sender.send(&answer).await.is_err() {
                    break;
                }
            }
        });
        let mut link = listener.accept(LIMIT).await?;
        link.sender
            .send(&ToShard::Welcome {
                world_size: ranks,
                generation: 0,
                pid: std::process::id(),
            })
            .await?;
        links.push(link);
    }
    Ok(links)
}

async fn round(links: &mut [Admitted], frame: &Frame<ToShard>) -> Result<Duration> {
    #[expect(
        clippy::disallowed_methods,
        reason = "measuring time is this program's purpose"
    )]
    let start = Instant::now();
    for sent in broadcast(links.iter_mut().map(|link| &mut link.sender), frame).await {
        sent?;
    }
    for link in links {
        link.receiver.recv_within(LIMIT).await?;
    }
    Ok(start.elapsed())
}

/// A decode step: one token for each of `rows` sequences of `context` tokens in blocks of 16.
fn plan(rows: u32, context: u32) -> ToShard {
    let row = |row: u32| PlanRow {
        tokens: vec![row],
        position: context - 1,
        blocks: (0..context / 16)
            .map(|block| BlockId(row * 4096 + block))
            .collect(),
        sampling: Some(Box::default()),
        ..PlanRow::default()
    };
    ToShard::Run(Box::new(StepPlan {
        rows: (0..rows).map(row).collect(),
        ..StepPlan::default()
    }))
}
