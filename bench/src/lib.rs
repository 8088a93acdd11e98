//! Benchmarks of any `OpenAI`-compatible server: the command line `cluster bench`.
//!
//! It speaks HTTP and knows nothing of the inside of a server; what a `cluster` exports as metrics
//! it reads as any other client would.
//!
//! Invariant: the load is fixed by the arguments before the first request is sent; how fast the
//! server is changes when requests are sent only through `--max-concurrency`.

pub mod args;
pub mod client;
mod cold;
pub mod latency;
mod launch;
pub mod load;
pub mod plot;
pub mod report;
pub mod serve;
pub mod startup;
pub mod steps;
pub mod stream;
mod svg;
pub mod sweep;
mod target;
pub mod throughput;

pub use args::{Args, Mode, Serve};
pub use report::{Outcome, Report, Setting};
pub use serve::measure;

/// Runs what the command line asks for, and prints the result.
///
/// # Errors
/// If the server cannot be reached, the result cannot be written, or every request failed.
pub async fn run(args: Args) -> anyhow::Result<()> {
    match args.mode {
        Mode::Serve(args) => serve::run(&args).await,
        Mode::Latency(args) => latency::run(&args).await,
        Mode::Throughput(args) => throughput::run(&args).await,
        Mode::Startup(args) => startup::run(&args).await,
        Mode::Sweep(args) => sweep::run(&args).await,
    }
}
