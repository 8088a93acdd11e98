//! With the feature `cuda`, makes the library that gives NCCL the name by which it is asked for.
//!
//! `libnccl.so`, empty, needing `libnccl.so.2`: see `src/comm/nccl/library.rs`. Without the feature nothing is done. With
//! `cuda-emulation`, tests let the libraries they load use the emulation's recorder.
//!
//! Invariant: no NCCL is needed to build.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CC");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    if env::var_os("CARGO_FEATURE_CUDA_EMULATION").is_some() {
        // What stands in for NCCL in `tests/doubles` is loaded as a library, and records where the kernels do.
        for name in ["cluster_emulation_is_recording", "cluster_emulation_queue"] {
            println!("cargo:rustc-link-arg-tests=-Wl,--export-dynamic-symbol={name}");
        }
    }
    match alias() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("cargo:warning={sentence}");
            ExitCode::FAILURE
        }
    }
}

/// Links the alias against a library that stands in for NCCL while linking.
fn alias() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let stand_in = out.join("libnccl.so.2");
    let link = |soname: &str, file: &PathBuf, needs: Option<&PathBuf>| {
        let mut compiler = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
        compiler.args(["-shared", "-nostdlib", "-s", "-Wl,--build-id=none"]);
        compiler.args(["-Wl,-z,noseparate-code", "-Wl,--no-as-needed"]);
        compiler
            .arg(format!("-Wl,-soname,{soname}"))
            .arg("-o")
            .arg(file);
        compiler
            .args(["-x", "c", "/dev/null", "-x", "none"])
            .args(needs);
        let status = compiler.status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{compiler:?} failed: {status}")),
            Err(error) => Err(format!(
                "a C compiler is needed, and {compiler:?} does not run: {error}"
            )),
        }
    };
    link("libnccl.so.2", &stand_in, None)?;
    link("libnccl.so", &out.join("nccl_alias.so"), Some(&stand_in))
}
