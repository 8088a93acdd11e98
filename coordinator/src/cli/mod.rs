//! The command line: what a person types, and what the process answers before and after it serves.
//!
//! Reading order: [`args`], [`layers`], [`prepare`], [`up`]. The only place that reads the
//! environment and writes to standard output and error.

mod adopt;
pub mod args;
mod doctor;
mod down;
mod find;
pub mod layers;
mod logs;
pub mod nodes;
pub mod prepare;
mod presence;
mod progress;
mod report;
mod run_batch;
pub mod scheduling;
mod signals;
mod status;
pub mod up;
pub mod values;

use anyhow::Context;
use args::{Cli, Command, LogFormat, Up};
use layers::LayerError;
use prepare::{Prepared, PreparedModel};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::OnceLock;
use topology::spec::cluster::Topology;
use topology::wire::WIRE_VERSION;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The revision this binary was built from, where the build was told.
pub const BUILD: &str = match option_env!("CLUSTER_BUILD") {
    Some(revision) => revision,
    None => "local",
};

/// What `/version` and `cluster -V` say.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What `cluster --version` says: enough to tell whether two binaries may work together.
fn long_version() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| format!("{VERSION} (build {BUILD}, wire {WIRE_VERSION})"))
}

/// The cluster could not start or could not go on.
const EXIT_FAULT: u8 = 1;
/// A flag, the configuration, the model or the port is wrong; nothing was started.
const EXIT_INPUT: u8 = 2;
/// A second signal ended it at once.
const EXIT_NOW: u8 = 130;

/// Reads the command line.
///
/// # Errors
/// The exit code, after whatever there is to say has been said: a mistake, or the help asked for.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Cli, ExitCode> {
    layers::parse(argv).map_err(|error| match error {
        LayerError::Usage(usage) => self::usage(&usage),
        below => complain(&below.into(), EXIT_INPUT),
    })
}

/// Prints a mistake on the command line, or the help that was asked for.
pub fn usage(usage: &clap::Error) -> ExitCode {
    // It knows whether it belongs on standard output.
    let _ = usage.print();
    u8::try_from(usage.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Runs another command that is asynchronous and has nothing to clean up.
pub fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads");
    match runtime.and_then(|runtime| runtime.block_on(work)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&error, EXIT_FAULT),
    }
}

/// Runs a command of the coordinator's own.
pub fn run(command: &Command) -> ExitCode {
    let up = match command {
        Command::Up(up) | Command::Plan(up) => up,
        Command::Status(status) => return status::run(status),
        Command::Logs(logs) => return logs::run(logs),
        Command::Down(down) => return down::run(down),
        Command::RunBatch(batch) => return run_batch::run(batch),
        Command::Doctor(doctor) => return doctor::run(doctor),
        Command::Bench(_) | Command::Shard { .. } => {
            unreachable!("the binary runs these itself")
        }
    };
    if up.print_config {
        return say(&layers::print(command));
    }
    if let Err(error) = log_to_stderr(up) {
        return complain(&error, EXIT_INPUT);
    }
    if matches!(command, Command::Up(_)) {
        return up::run(up);
    }
    match Prepared::new(up) {
        Ok(prepared) => say(&plan(&prepared)),
        Err(error) => complain(&error, EXIT_INPUT),
    }
}

/// What `cluster plan` shows.
fn plan(prepared: &Prepared) -> String {
    let models = prepared.models.iter().enumerate();
    let models = models.map(|(index, model)| plan_of(prepared.topology.as_ref(), index, model));
    let mut text = models.collect::<Vec<_>>().join("\n");
    for warning in &prepared.warnings {
        let _ = writeln!(text, "warning: {warning}"); // strings do not fail
    }
    text
}

fn plan_of(topology: Option<&Topology>, index: usize, prepared: &PreparedModel) -> String {
    let shape = &prepared.model.shape;
    let quantised = shape.quantization.as_ref();
    let quantised = quantised.map_or_else(String::new, |stored| {
        format!(", linear layers by {}", stored.method.name())
    });
    let mut text = format!(
        "{}: {}, {} layers, {} query and {} KV heads, {} stored{quantised}
",
        prepared.model.name(),
        shape.architecture,
        shape.num_layers,
        shape.num_heads,
        shape.num_kv_heads,
        shape.dtype.name(),
    );
    for (rank, device) in prepared.placement.ranks() {
        let place = topology.and_then(|it| nodes::describe(it, index, rank.index()));
        let place = place.map_or_else(String::new, |place| format!("{place}, "));
        let _ = writeln!(text, "rank {rank}: {place}{device}"); // strings do not fail
    }
    text + &prepared.report.to_string() + "\n"
}

/// Which lines are logged. A lone word must be a level: as the name of a part of the program it would
/// silence all others.
fn filter(text: &str) -> anyhow::Result<EnvFilter> {
    let mut words = text.split(',').filter(|part| !part.contains(['=', '[']));
    if let Some(word) = words.find(|word| word.trim().parse::<LevelFilter>().is_err()) {
        anyhow::bail!(
            "--log-level {text}: `{word}` is no level; give error, warn, info, debug or trace, or a \
             filter such as coordinator=debug"
        );
    }
    let filter = EnvFilter::try_new(text);
    filter.with_context(|| format!("--log-level {text} is no filter such as coordinator=debug"))
}

fn log_to_stderr(up: &Up) -> anyhow::Result<()> {
    let filter = filter(&up.log_level)?;
    let subscriber = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal());
    // Fails where a test has set one, which then serves.
    let _ = match up.log_format {
        LogFormat::Text => subscriber.try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    Ok(())
}

fn say(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// One sentence on standard error, and the exit code.
fn complain(error: &anyhow::Error, code: u8) -> ExitCode {
    // Nothing is left to do where even this cannot be written.
    let _ = writeln!(io::stderr(), "cluster: {error:#}");
    ExitCode::from(code)
}
