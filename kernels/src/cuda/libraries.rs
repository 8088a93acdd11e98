//! The libraries that are looked for when the program runs, and a sentence about each that is not there.
//!
//! The driver comes with the machine. cuBLASLt comes with a CUDA toolkit or a Python package, often in a
//! directory that the loader does not search, so the usual ones are gone through here and the
//! library is opened by its path; whoever asks the loader for its name afterwards gets that one.
//! Nothing is asked of a library before it is known to be there.
//!
//! Invariant: a missing library is a sentence that names it, says where it was looked for and how to get it.

#![expect(unsafe_code, reason = "libraries run code when they are opened")]

use crate::backend::DeviceError;
use libloading::Library;
use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Directories to look in first, separated by colons.
pub const LIBRARY_PATH: &str = "CLUSTER_CUDA_LIBRARIES";

/// A library that CUDA needs, and how an operator gets it.
#[derive(Debug)]
struct Wanted {
    name: &'static str,
    files: &'static [&'static str],
    how: &'static str,
    /// Once opened it stays so: the loader then finds it by its name, wherever it is.
    opened: OnceLock<Result<Library, String>>,
}

static DRIVER: Wanted = Wanted {
    name: "the NVIDIA driver",
    files: &["libcuda.so.1", "libcuda.so"],
    how: "install the NVIDIA driver of version 580 or newer; in a container, start it with the GPUs (docker run --gpus all)",
    opened: OnceLock::new(),
};

static CUBLASLT: Wanted = Wanted {
    name: "cuBLASLt",
    files: &["libcublasLt.so.13", "libcublasLt.so"],
    how: "install CUDA 13's libraries (apt-get install libcublas-13-0, or pip install nvidia-cublas), or set CLUSTER_CUDA_LIBRARIES to the directory that holds it",
    opened: OnceLock::new(),
};

static NVML: Wanted = Wanted {
    name: "NVML",
    files: &["libnvidia-ml.so.1", "libnvidia-ml.so"],
    how: "it comes with the NVIDIA driver; in a container, ask for the utility capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
    opened: OnceLock::new(),
};

/// An error where the driver is not there; afterwards the loader finds it by its name.
pub(crate) fn check_driver(ordinal: usize) -> Result<(), DeviceError> {
    DRIVER.check(&format!("GPU {ordinal}"))
}

/// An error where cuBLASLt is not there; afterwards the loader finds it by its name.
pub(crate) fn check_cublaslt(device: &str) -> Result<(), DeviceError> {
    CUBLASLT.check(device)
}

impl Wanted {
    fn check(&self, device: &str) -> Result<(), DeviceError> {
        match self.opened.get_or_init(|| open(self)) {
            Ok(_) => Ok(()),
            Err(reason) => Err(DeviceError::Failed {
                device: device.to_owned(),
                reason: reason.clone(),
            }),
        }
    }
}

/// What is missing of the libraries that a GPU needs, a sentence for each. Opens nothing on a device.
pub fn missing() -> Vec<String> {
    [&DRIVER, &CUBLASLT, &NVML]
        .into_iter()
        .filter_map(|wanted| open(wanted).err())
        .collect()
}

/// Where a library may be beside the loader's own directories.
fn directories() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = Vec::new();
    let lists = [env::var_os(LIBRARY_PATH)];
    all.extend(lists.iter().flatten().flat_map(env::split_paths));
    for toolkit in ["CUDA_HOME", "CUDA_PATH"] {
        all.extend(env::var_os(toolkit).map(|root| Path::new(&root).join("lib64")));
    }
    all.extend(["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64"].map(PathBuf::from));
    // Python packages: of the python3 that is on the PATH, and the system's.
    let path = env::var_os("PATH").unwrap_or_default();
    let python = env::split_paths(&path).find(|dir| dir.join("python3").exists());
    let root = python.and_then(|dir| dir.parent().map(Path::to_path_buf));
    let system = ["/usr/local", "/usr"].map(PathBuf::from);
    for root in root.into_iter().chain(system) {
        let Ok(versions) = root.join("lib").read_dir() else {
            continue;
        };
        let mut pythons: Vec<_> = (versions.flatten())
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
            .map(|entry| entry.path())
            .collect();
        pythons.sort();
        for python in pythons {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                all.extend(["cu13/lib", "cublas/lib"].map(|dir| nvidia.join(dir)));
            }
        }
    }
    all
}

/// Opens it, or says what to do.
fn open(wanted: &Wanted) -> Result<Library, String> {
    let directories = directories();
    // The operator's directory goes before the loader's, the guesses after.
    let chosen = env::var_os(LIBRARY_PATH).map_or(0, |list| env::split_paths(&list).count());
    let (first, last) = directories.split_at(chosen.min(directories.len()));
    let inside = |dirs: &[PathBuf]| -> Vec<PathBuf> {
        dirs.iter()
            .flat_map(|dir| wanted.files.iter().map(|file| dir.join(file)))
            .filter(|path| path.exists())
            .collect()
    };
    let by_name = wanted.files.iter().map(PathBuf::from);
    let candidates = inside(first).into_iter().chain(by_name).chain(inside(last));
    let mut refused = Vec::new();
    for path in candidates {
        // SAFETY: these are NVIDIA's libraries; what they run on opening is theirs to get right.
        match unsafe { Library::new(&path) } {
            Ok(library) => return Ok(library),
            Err(error) if path.is_absolute() => refused.push(error.to_string()),
            Err(_) => {}
        }
    }
    let mut searched = vec!["the loader's directories (LD_LIBRARY_PATH)".to_owned()];
    searched.extend(directories.iter().map(|dir| dir.display().to_string()));
    let refused = if refused.is_empty() {
        String::new()
    } else {
        format!(" (found, but: {})", refused.join("; "))
    };
    Err(format!(
        "{} is not there: no {} in {}{refused}; {}",
        wanted.name,
        wanted.files[0],
        searched.join(", "),
        wanted.how
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_its_name_the_places_and_the_way_to_get_it() {
        let wanted = Wanted {
            name: "the library of this test",
            files: &["libcluster_test_nowhere.so.7"],
            how: "do not",
            opened: OnceLock::new(),
        };
        let sentence = open(&wanted).unwrap_err();
        for part in [
            wanted.name,
            wanted.files[0],
            "LD_LIBRARY_PATH",
            "/usr/local/cuda",
            "do not",
        ] {
            assert!(sentence.contains(part), "{part} in: {sentence}");
        }
    }

    #[test]
    fn a_library_that_is_there_is_found_by_its_name() {
        let wanted = Wanted {
            name: "the C library",
            files: &["libc.so.6"],
            how: "nothing",
            opened: OnceLock::new(),
        };
        assert!(open(&wanted).is_ok());
    }
}
