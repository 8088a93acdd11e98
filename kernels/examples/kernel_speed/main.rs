//! Measures every operation of the CPU backend against what this machine can do at most.
//!
//!     cargo run --release -p kernels --example kernel_speed -- [--threads N] [--cpu-isa auto] [--only NAME]
//!         [--bounds] [--json]
//!
//! A line per operation and shape (those of Qwen2.5-0.5B): median wall time and its spread, rates, and the share of the
//! bound, which is the arithmetic peak or the bandwidth of where its data lies, whichever takes longer; the
//! three bounds are measured first, in the same run with the same threads. `--bounds` measures nothing else.
//! It judges nothing: the tests decide what is right.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "it measures and prints"
)]

mod cases;
mod measure;

use kernels::backend::{Backend, Element};
use kernels::cpu::CpuBackend;
use measure::Bench;
use std::error::Error;
use std::process::ExitCode;

struct Options {
    threads: usize,
    isa: String,
    only: String,
    bounds: bool,
    json: bool,
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernel_speed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        threads: std::thread::available_parallelism()?.get(),
        isa: "auto".to_owned(),
        only: String::new(),
        bounds: false,
        json: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--threads" => options.threads = value()?.parse()?,
            "--cpu-isa" => options.isa = value()?,
            "--only" => options.only = value()?,
            "--bounds" => options.bounds = true,
            "--json" => options.json = true,
            _ => return Err(format!("{flag} is not known").into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let mut cpu = CpuBackend::with_isa(options.threads, None, &options.isa)?;
    // As most models are.
    cpu.compute_in(Element::Bf16);
    let bench = Bench::new(
        (&cpu, options.threads),
        options.only.clone(),
        options.json || options.bounds,
    )?;
    let device = cpu.name();
    println!("{}", bench.bounds_line(&device));
    if options.bounds {
        return Ok(());
    }
    bench.head();
    cases::products(&bench)?;
    cases::attention(&bench)?;
    cases::by_element(&bench)?;
    cases::positions(&bench)?;
    cases::sampling(&bench)?;
    Ok(())
}
