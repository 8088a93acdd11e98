//! The same checks over the NCCL communicator, on doubles of driver and library that need no GPU.
//!
//! With the feature `cuda-emulation` kernels run on the CPU, and `tests/doubles` stands in for what
//! collectives call. This program compiles those and starts itself again with them. Invariant: nothing of
//! them outlives the check.

use std::path::Path;
use std::process::Command;

/// File in `tests/doubles`, and the library it stands in for.
const DOUBLES: [(&str, &str); 2] = [("cuda.c", "libcuda.so.1"), ("nccl.c", "libnccl.so.2")];

pub(crate) fn the_same_over_doubles_of_cuda_and_nccl() {
    // In the run that this starts, and on a real GPU, the checks are the real ones already.
    if !cfg!(feature = "cuda-emulation") || std::env::var_os("CLUSTER_TEST_GPU").is_some() {
        return;
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/doubles");
    let libraries = tempfile::tempdir().expect("there is room");
    for (source, name) in DOUBLES {
        let status = Command::new("cc")
            .args([
                "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread",
            ])
            .arg(format!("-Wl,-soname,{name}"))
            .arg("-o")
            .arg(libraries.path().join(name))
            .arg(sources.join(source))
            .status();
        assert!(status.expect("there is a C compiler").success(), "{source}");
    }
    let again = || {
        let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
        let nccl = libraries.path().join("libnccl.so.2");
        command
            .env("CLUSTER_TEST_GPU", "0")
            .env("LD_LIBRARY_PATH", libraries.path())
            .env("CLUSTER_NCCL_SO_PATH", nccl);
        command
    };
    assert!(again().status().expect("it runs").success());
    // What is noticed costs no survivor either.
    let status = again()
        .arg("a_killed_rank")
        .env("NCCL_DOUBLE_NOTICES", "1")
        .status();
    assert!(status.expect("it runs").success());
}
