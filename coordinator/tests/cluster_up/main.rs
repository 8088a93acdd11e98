//! Black-box tests of the binary: real processes, real sockets, the built-in model.
//!
//! Each test starts its own cluster on a free port. They take turns, because a machine with two
//! cores has room for one cluster at a time; what runs out of time fails.

mod adopt;
mod adopt_hosts;
mod adopt_ways;
mod background;
mod batch;
mod client;
mod doctor;
mod fake_ssh;
mod hostile;
mod hosts;
mod lifecycle;
mod memory;
mod models;
mod network;
mod operator;
mod pressure;
mod process;
mod quality;
mod recovery;
mod serving;
mod sockets;
mod ssh_ways;
mod tenants;
mod wrong_input;

use std::fs;
use std::sync::{Mutex, MutexGuard};

/// Held by whoever runs a cluster.
static TURN: Mutex<()> = Mutex::new(());

/// Waits for this test's turn. One that failed before must not fail the others: what its clusters left is forgotten.
fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|failed| {
        TURN.clear_poison();
        let _ = fs::remove_dir_all(process::RUN_DIR);
        failed.into_inner()
    })
}
