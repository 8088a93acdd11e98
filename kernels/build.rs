//! Compiles the CUDA kernels, `src/ops/**/*.cu`, into one static library.
//!
//! With the feature `cuda`, nvcc makes machine code for each architecture of `CLUSTER_CUDA_ARCHS` (default
//! `80 90a 100 120`), and the CUDA runtime is linked statically. With `cuda-emulation`
//! the same files are compiled by the host's compiler against `src/cuda/emulation.h`, and no toolkit is needed.
//! Without either nothing is done. Resource use per kernel is left in `OUT_DIR/*.resources`, for a report.
//!
//! Objects are kept in `target/cuda-kernels`, so that builds of other profiles and features find them.
//!
//! Invariant: a kernel is compiled again when it, a header that it includes, or the list of architectures changes.

#![expect(clippy::print_stderr, reason = "cargo shows it where the build fails")]
#![expect(
    clippy::disallowed_methods,
    reason = "cargo speaks to build scripts through the environment"
)]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::SystemTime;

/// A100, H100 with its own instructions, B200, and the workstation cards of the same time.
const DEFAULT_ARCHS: &str = "80 90a 100 120";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("cargo:warning={sentence}");
            eprintln!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    println!("cargo:rerun-if-changed=build.rs");
    let compiler = if env::var_os("CARGO_FEATURE_CUDA_EMULATION").is_some() {
        Compiler::host()
    } else if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        Compiler::nvcc()?
    } else {
        return Ok(());
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let ops = Path::new("src/ops");
    // New files are noticed, and changes of those there are.
    println!("cargo:rerun-if-changed={}", ops.display());
    println!("cargo:rerun-if-changed=src/cuda");
    let mut sources = Vec::new();
    find_kernels(ops, &mut sources)?;
    if compiler.libraries.is_none() {
        // The emulation's own test.
        sources.push("src/cuda/emulation_test.cu".into());
    }
    sources.sort();

    let kept = target_dir()?.join("cuda-kernels").join(&compiler.identity);
    fs::create_dir_all(&kept).map_err(|error| format!("make {}: {error}", kept.display()))?;
    let in_dir = |dir: &Path| -> Vec<PathBuf> {
        (sources.iter().map(|source| object_path(dir, source))).collect()
    };
    let (objects, copies) = (in_dir(&kept), in_dir(&out));
    compile_all(&compiler, &sources, &objects)?;
    for (object, copy) in objects.iter().zip(&copies) {
        copy_object(object, copy)?;
    }
    archive(&out, &copies)?;
    compiler.link();
    Ok(())
}

/// Copies an object, and what was said about its kernels, to where scripts find those of this build.
fn copy_object(object: &Path, copy: &Path) -> Result<(), String> {
    for extension in ["o", "resources"] {
        let (from, to) = (
            object.with_extension(extension),
            copy.with_extension(extension),
        );
        if from.exists() {
            fs::copy(&from, &to).map_err(|error| format!("copy {}: {error}", from.display()))?;
        }
    }
    Ok(())
}

/// All `.cu` files under `dir`.
fn find_kernels(dir: &Path, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("read {}: {error}", dir.display()))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            find_kernels(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            found.push(path);
        }
    }
    Ok(())
}

/// `src/ops/a/b.cu` becomes `a_b.o`.
fn object_path(out: &Path, source: &Path) -> PathBuf {
    let relative = source
        .strip_prefix("src/ops")
        .unwrap_or(source)
        .with_extension("o");
    out.join(relative.to_string_lossy().replace('/', "_"))
}

/// Compiles with as many processes as cargo allows, and fails with what the first compiler said.
fn compile_all(
    compiler: &Compiler,
    sources: &[PathBuf],
    objects: &[PathBuf],
) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let (Some(source), Some(object)) = (sources.get(index), objects.get(index)) else {
                return;
            };
            if let Err(said) = compiler.compile(source, object)
                && let Ok(mut failed) = failed.lock()
            {
                failed.get_or_insert(said);
                next.store(sources.len(), Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..sources.len().min(jobs) {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().map_err(|error| error.to_string())?;
    failed.map_or(Ok(()), Err)
}

fn archive(out: &Path, objects: &[PathBuf]) -> Result<(), String> {
    let library = out.join("libcluster_kernels.a");
    // `ar` adds to an archive that is there.
    let _ = fs::remove_file(&library);
    let mut command = Command::new("ar");
    run_quietly(command.arg("crs").arg(&library).args(objects))?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=cluster_kernels");
    Ok(())
}

/// What compiles a `.cu` file, with the arguments that are the same for all.
struct Compiler {
    program: PathBuf,
    arguments: Vec<OsString>,
    /// The toolkit's libraries; none under emulation.
    libraries: Option<PathBuf>,
    /// A directory's name: another compiler's objects, or those for other architectures, must not be taken.
    identity: String,
}

impl Compiler {
    /// The host's compiler. Contraction of products and sums is left out, as it differs between machines.
    fn host() -> Self {
        let arguments = [
            "-x",
            "c++",
            "-std=c++17",
            "-O2",
            "-g1",
            "-fPIC",
            "-ffp-contract=off",
            "-Wall",
            "-Wno-unknown-pragmas",
            // Indices outside shared arrays are told with their place; emulation.h takes the call.
            "-fsanitize=bounds",
            "-DCLUSTER_CUDA_EMULATION",
            "-Isrc/cuda",
            "-c",
        ];
        println!("cargo:rerun-if-env-changed=CXX");
        Self::new(
            env::var_os("CXX").map_or_else(|| "g++".into(), PathBuf::from),
            arguments.map(OsString::from).to_vec(),
            None,
        )
    }

    fn nvcc() -> Result<Self, String> {
        for variable in ["CUDA_HOME", "PATH", "CLUSTER_CUDA_ARCHS"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let installed = target_dir()?.join("cuda");
        let toolkits = env::var_os("CUDA_HOME").map(PathBuf::from).into_iter();
        let on_path = env::var_os("PATH").unwrap_or_default();
        let on_path =
            env::split_paths(&on_path).filter_map(|dir| dir.parent().map(Path::to_path_buf));
        let root = toolkits
            .chain([installed.clone()])
            .chain(on_path)
            .find(|root| root.join("bin/nvcc").is_file())
            .ok_or("no CUDA compiler: neither in CUDA_HOME, nor in target/cuda, nor on the PATH; run scripts/cuda_toolchain.sh, which installs one into target/cuda")?;
        println!(
            "cargo:rerun-if-changed={}",
            installed.join("pins").display()
        );
        let flashinfer = installed.join("flashinfer");
        if !flashinfer.is_dir() {
            return Err("FlashInfer's headers are not in target/cuda; run scripts/cuda_toolchain.sh, which installs them".to_owned());
        }
        let mut arguments: Vec<OsString> = [
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC",
            "--expt-relaxed-constexpr",
            "--expt-extended-lambda",
            "-Xptxas=-v",
            "-diag-suppress=177",
            "-Isrc/cuda",
            "-c",
        ]
        .map(OsString::from)
        .to_vec();
        // The order matters: FlashInfer brings the version of these that it was written against.
        for headers in [
            "cccl/libcudacxx/include",
            "cccl/cub",
            "cccl/thrust",
            "cutlass/include",
            "include",
        ] {
            arguments.push("-isystem".into());
            arguments.push(flashinfer.join(headers).into());
        }
        let archs = env::var("CLUSTER_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
        for arch in archs.split_whitespace() {
            arguments.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}").into());
        }
        let libraries = ["lib64", "lib", "targets/x86_64-linux/lib"].map(|lib| root.join(lib));
        let libraries = libraries
            .into_iter()
            .find(|lib| lib.join("libcudart_static.a").is_file());
        let libraries = libraries.ok_or_else(|| {
            format!(
                "{} has no libcudart_static.a; run scripts/cuda_toolchain.sh and unset CUDA_HOME",
                root.display()
            )
        })?;
        Ok(Self::new(root.join("bin/nvcc"), arguments, Some(libraries)))
    }

    fn new(program: PathBuf, arguments: Vec<OsString>, libraries: Option<PathBuf>) -> Self {
        let mut hasher = DefaultHasher::new();
        // Paths in what compilers write are relative to the package.
        (&program, &arguments, env::var_os("CARGO_MANIFEST_DIR")).hash(&mut hasher);
        let kind = if libraries.is_some() {
            "nvcc"
        } else {
            "emulation"
        };
        let identity = format!("{kind}-{:016x}", hasher.finish());
        Self {
            program,
            arguments,
            libraries,
            identity,
        }
    }

    /// Compiles one file unless its object is newer than everything it was made of.
    fn compile(&self, source: &Path, object: &Path) -> Result<(), String> {
        if is_newer(object, &object.with_extension("d")) {
            return Ok(());
        }
        let start = SystemTime::now();
        // Another build may be at the same object: each writes its own and moves it into place.
        let own = |extension: &str| object.with_extension(format!("{}.{extension}", process::id()));
        let (made, dependencies, resources) = (own("o"), own("d"), own("resources"));
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        // Places in the source, for compute-sanitizer; those of FlashInfer's templates take many MiB.
        let is_template = source.to_string_lossy().contains("flashinfer");
        if self.libraries.is_some() && !is_template {
            command.arg("-lineinfo");
        }
        command.arg(source).arg("-o").arg(&made);
        command.arg("-MMD").arg("-MF").arg(&dependencies);
        let said = run_quietly(&mut command)?;
        let place = || {
            // What changed while the compiler ran is newer than this.
            fs::File::options()
                .write(true)
                .open(&made)?
                .set_modified(start)?;
            if self.libraries.is_some() {
                fs::write(&resources, &said)?;
                fs::rename(&resources, object.with_extension("resources"))?;
            }
            fs::rename(&dependencies, object.with_extension("d"))?;
            fs::rename(&made, object)
        };
        place().map_err(|error| format!("write {}: {error}", object.display()))
    }

    /// What the kernels need beside themselves.
    fn link(&self) {
        if let Some(libraries) = &self.libraries {
            println!("cargo:rustc-link-search=native={}", libraries.display());
            println!("cargo:rustc-link-lib=static=cudart_static");
            for library in ["dl", "rt", "pthread"] {
                println!("cargo:rustc-link-lib={library}");
            }
        }
        println!("cargo:rustc-link-lib=stdc++");
    }
}

/// Runs it and returns what it said; an error where it fails.
fn run_quietly(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    Err(format!("{program} failed: {command:?}\n{said}"))
}

/// Whether `object` is newer than all files that the depfile names.
fn is_newer(object: &Path, dependencies: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    let (Some(made), Ok(text)) = (modified(object), fs::read_to_string(dependencies)) else {
        return false;
    };
    let text = text.replace("\\\n", " ");
    let Some((_, files)) = text.split_once(':') else {
        return false;
    };
    files
        .split_whitespace()
        .all(|file| modified(Path::new(file)).is_some_and(|time| time < made))
}

/// Cargo's target directory, from where it put this build.
fn target_dir() -> Result<PathBuf, String> {
    // OUT_DIR is TARGET/[TRIPLE/]PROFILE/build/PACKAGE-HASH/out.
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let build = out
        .ancestors()
        .nth(3)
        .ok_or("OUT_DIR is in a target directory")?;
    let mut dirs = build.ancestors().skip(1).take(2);
    let inner = dirs.next().ok_or("OUT_DIR is in a target directory")?;
    if inner.join("cuda").is_dir() {
        return Ok(inner.to_path_buf());
    }
    Ok(dirs
        .next()
        .filter(|outer| outer.join("cuda").is_dir())
        .unwrap_or(inner)
        .to_path_buf())
}
