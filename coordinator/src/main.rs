//! The binary `cluster`: one file that is coordinator, shard and load generator.
//!
//! The only place that names the shard and bench libraries: the coordinator's own code cannot reach
//! a device, and the load generator cannot reach the coordinator.

use clap::Parser;
use coordinator::cli::args::{Command, Rest};
use coordinator::{builtin, cli};
use std::ffi::OsString;
use std::process::ExitCode;
use topology::launch::attend::{self, Charge};

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.command {
        Command::Shard { probe: true, .. } => shard::probe(),
        Command::Shard { examine: true, .. } => shard::examine(),
        Command::Shard {
            attend: Some(charge),
            ..
        } => look_after(&charge),
        Command::Shard { log, after, .. } => {
            shard::run(&shard::Options { log, after }, builtin::FILES)
        }
        Command::Bench(rest) => bench(rest),
        command => cli::run(&command),
    }
}

/// Standard output gets what the shard says.
fn look_after(charge: &Charge) -> ExitCode {
    match attend::attend(charge, std::io::stdin(), std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The load generator has a command line of its own.
fn bench(rest: Rest) -> ExitCode {
    let name = OsString::from("cluster bench");
    match bench::Args::try_parse_from(std::iter::once(name).chain(rest.args)) {
        Ok(args) => cli::block_on(bench::run(args)),
        Err(usage) => cli::usage(&usage),
    }
}
