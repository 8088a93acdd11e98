//! Several ranks as processes: rank 0 makes the communicator's identity and prints it, the launcher hands it on.
//!
//! The launcher computes nothing. Invariant: it ends when all ranks have, and fails if one did.

use crate::options::{Device, Options};
use anyhow::{Context, Result, ensure};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// What the line with the identity begins with.
const ID: &str = "communicator ";

/// Starts one process per rank with the same arguments.
pub(crate) fn launch(options: &Options) -> Result<()> {
    let mut first = start(options, 0, None)?;
    let stdout = first.stdout.take().context("rank 0 has an output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut ranks = vec![first];
    while let Some(line) = lines.next().transpose()? {
        match line.strip_prefix(ID) {
            Some(id) => {
                for rank in 1..options.tp {
                    ranks.push(start(options, rank, Some(id))?);
                }
            }
            None => println!("{line}"),
        }
    }
    for (rank, mut child) in ranks.into_iter().enumerate() {
        let status = child.wait()?;
        ensure!(status.success(), "rank {rank} ended with {status}");
    }
    Ok(())
}

fn start(options: &Options, rank: u32, id: Option<&str>) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args().skip(1));
    command.args(["--rank", &rank.to_string()]);
    if let Some(id) = id {
        command.args(["--id", id]);
    } else {
        command.stdout(Stdio::piped());
    }
    if let Device::Gpu(_) = options.device {
        // As the product does for `--gpus 0,0`.
        let shared = [
            ("NCCL_RAS_ENABLE", "0"),
            ("NCCL_GRAPH_REGISTER", "0"),
            ("NCCL_MULTI_RANK_GPU_ENABLE", "1"),
            ("NCCL_MAX_CTAS", "2"),
            ("NCCL_NVLS_ENABLE", "0"),
        ];
        command.envs(shared);
    }
    command
        .spawn()
        .with_context(|| format!("start rank {rank}"))
}

/// The identity: made by rank 0, which says it to the launcher, or handed over.
pub(crate) fn identity(
    options: &Options,
    make: impl FnOnce() -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    if let Some(id) = &options.id {
        let digits = id.as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair)?, 16).context("--id");
        return digits.map(byte).collect();
    }
    let id = make()?;
    if options.rank.is_some() {
        let mut line = ID.to_owned();
        for byte in &id {
            write!(line, "{byte:02x}").context("write into a string")?;
        }
        println!("{line}");
    }
    Ok(id)
}
