//! Finds NCCL, loads it, and makes sure that the bindings find it too.
//!
//! Runtime packages ship `libnccl.so.2` and nothing else; the bindings ask the loader for `libnccl.so`.
//! So the library is opened by its path, and after it an alias: an empty library of that name which needs
//! `libnccl.so.2` (`build.rs` makes it, 5 KB). From then on the loader knows the name. Makes no
//! communicator; nothing here needs a GPU.
//!
//! Invariant: no function of the library is called before it is known to be there and new enough.

#![expect(unsafe_code, reason = "libraries run code when they are opened")]

use cudarc::nccl::{result, sys};
use libloading::Library;
use rustix::fs::MemfdFlags;
use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Name of the file that packages ship.
const FILE: &str = "libnccl.so.2";

/// Variables that name the file itself; the second is what `vllm` reads.
const FILE_VARIABLES: [&str; 2] = ["CLUSTER_NCCL_SO_PATH", "VLLM_NCCL_SO_PATH"];

/// A library named `libnccl.so` that holds nothing and needs [`FILE`].
const ALIAS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nccl_alias.so"));

/// Version 2.19.3, from which on a communicator can be aborted while its peers are dead.
const OLDEST: i32 = 21903;

/// The first version that lets ranks share a GPU.
const OLDEST_SHARING: i32 = 23003;

/// How an operator gets it.
const HOW: &str = "ranks need it to exchange activations: install it (pip install nvidia-nccl-cu13, or \
                   apt-get install libnccl2), or name the file in CLUSTER_NCCL_SO_PATH";

/// Where to look, in order.
#[derive(Debug, Default)]
struct Places {
    /// A variable and the file it names.
    named: Option<(&'static str, PathBuf)>,
    directories: Vec<PathBuf>,
}

impl Places {
    /// Of this process.
    fn of_process() -> Self {
        let named = FILE_VARIABLES.into_iter().find_map(|name| {
            let value = env::var_os(name).filter(|value| !value.is_empty())?;
            Some((name, PathBuf::from(value)))
        });
        let split = |list: Option<OsString>| -> Vec<PathBuf> {
            list.iter().flat_map(env::split_paths).collect()
        };
        let mut directories = split(env::var_os("LD_LIBRARY_PATH"));
        directories.extend(split(env::var_os("CLUSTER_CUDA_LIBRARIES")));
        let program = env::current_exe().ok();
        let beside = program.as_deref().and_then(Path::parent);
        directories.extend(
            beside
                .iter()
                .flat_map(|dir| [dir.to_path_buf(), dir.join("lib")]),
        );
        directories.extend(loader_directories(Path::new("/etc/ld.so.conf.d")));
        for toolkit in ["CUDA_HOME", "CUDA_PATH"] {
            directories.extend(env::var_os(toolkit).map(|root| Path::new(&root).join("lib64")));
        }
        directories.push("/usr/local/cuda/lib64".into());
        let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].map(env::var_os);
        let prefixes = prefixes.into_iter().flatten().map(PathBuf::from);
        let python = python_prefix(&split(env::var_os("PATH")));
        let system = ["/usr/local", "/usr"].map(PathBuf::from);
        for prefix in prefixes.chain(python).chain(system) {
            directories.extend(package_directories(&prefix));
        }
        Self { named, directories }
    }

    /// The file, or the sentence that says where it was looked for.
    fn find(&self) -> Result<PathBuf, String> {
        if let Some((variable, file)) = &self.named {
            let file = if file.is_dir() {
                file.join(FILE)
            } else {
                file.clone()
            };
            return if file.is_file() {
                Ok(file)
            } else {
                Err(format!(
                    "NCCL is not at {}, which {variable} names; correct or unset it",
                    file.display()
                ))
            };
        }
        let files = self.directories.iter().map(|dir| dir.join(FILE));
        files.into_iter().find(|file| file.is_file()).ok_or_else(|| {
            format!(
                "{FILE} (NCCL) was not found in LD_LIBRARY_PATH, beside the program, in the loader's \
                 directories or among Python's packages ({} directories); {HOW}",
                self.directories.len()
            )
        })
    }
}

/// What the loader's configuration names, and its defaults.
fn loader_directories(configuration: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = (fs::read_dir(configuration).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "conf")
        })
        .collect();
    files.sort();
    let texts = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok());
    let mut directories: Vec<PathBuf> = texts
        .flat_map(|text| {
            text.lines()
                .map(str::trim)
                .map(PathBuf::from)
                .collect::<Vec<_>>()
        })
        .filter(|line| line.is_absolute())
        .collect();
    directories
        .extend(["/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"].map(PathBuf::from));
    directories
}

/// Where a Python environment keeps NCCL's package, for each of its versions.
fn package_directories(prefix: &Path) -> Vec<PathBuf> {
    let versions = fs::read_dir(prefix.join("lib"))
        .into_iter()
        .flatten()
        .flatten();
    let mut pythons: Vec<PathBuf> = versions
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path())
        .collect();
    pythons.sort();
    let packages = |python: PathBuf| {
        ["site-packages", "dist-packages"].map(|kind| python.join(kind).join("nvidia/nccl/lib"))
    };
    pythons.into_iter().flat_map(packages).collect()
}

/// The environment that `python3` belongs to, from where it stands and not from where it points.
fn python_prefix(path: &[PathBuf]) -> Option<PathBuf> {
    let bin = path.iter().find(|dir| dir.join("python3").exists())?;
    bin.parent().map(Path::to_path_buf)
}

/// Where NCCL is on this host. Does not open it.
///
/// # Errors
/// A sentence that names it, says where it was looked for and how to get it.
pub(crate) fn find() -> Result<PathBuf, String> {
    Places::of_process().find()
}

/// Loads it, once. Returns its version as a number: 2.30.7 is 23007.
///
/// # Errors
/// A sentence: it is not there, cannot be opened, or is too old.
pub(crate) fn load() -> Result<i32, String> {
    static LOADED: OnceLock<Result<(i32, [Library; 2]), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| open(&find()?));
    loaded
        .as_ref()
        .map(|(version, _)| *version)
        .map_err(Clone::clone)
}

fn open(file: &Path) -> Result<(i32, [Library; 2]), String> {
    let refused = |what: &str, error: &dyn std::fmt::Display| {
        format!("NCCL is at {}, but {what}: {error}", file.display())
    };
    // SAFETY: this is NVIDIA's library; what it runs on opening is its to get right.
    let library = unsafe { Library::new(file) };
    let library = library.map_err(|error| refused("it cannot be opened", &error))?;
    let alias = open_alias().map_err(|error| refused("its name cannot be made known", &error))?;
    // SAFETY: only opens libraries, by names that now lead to the two above.
    if !unsafe { sys::is_culib_present() } {
        return Err(refused(
            "the loader does not find it",
            &"the alias has no effect",
        ));
    }
    let version = result::get_nccl_version();
    let version = version.map_err(|error| {
        refused(
            "it does not say its version",
            &format_args!("{:?}", error.0),
        )
    })?;
    if version < OLDEST {
        let found = format!("it is version {}", dotted(version));
        return Err(refused(
            &found,
            &format!("{} or newer is needed; {HOW}", dotted(OLDEST)),
        ));
    }
    tracing::info!(version = dotted(version), "NCCL is {}", file.display());
    Ok((version, [library, alias]))
}

/// Opens the alias from memory: no file of it is ever on disk.
fn open_alias() -> Result<Library, String> {
    let memory = rustix::fs::memfd_create("libnccl.so", MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.map_err(|error| error.to_string())?);
    file.write_all(ALIAS).map_err(|error| error.to_string())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: it holds no code.
    unsafe { Library::new(path) }.map_err(|error| error.to_string())
}

/// Whether ranks share a GPU, which whoever starts them says by this variable.
pub(super) fn shares_gpu() -> bool {
    env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|value| value == "1")
}

/// Refuses ranks that share a GPU where the `version` that was loaded cannot.
///
/// # Errors
/// A sentence.
pub(super) fn check_sharing(version: i32, shares_gpu: bool) -> Result<(), String> {
    if !shares_gpu || version >= OLDEST_SHARING {
        return Ok(());
    }
    Err(format!(
        "ranks that share a GPU need NCCL {} or newer, and this is {}; give each rank a GPU of its own, or {HOW}",
        dotted(OLDEST_SHARING),
        dotted(version)
    ))
}

/// `23007` as `2.30.7`.
pub(crate) fn dotted(version: i32) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    #[test]
    fn a_named_file_is_taken_or_the_variable_is_blamed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("nccl.so");
        let places = |file: &Path| Places {
            named: Some(("CLUSTER_NCCL_SO_PATH", file.to_path_buf())),
            ..Places::default()
        };
        let refused = places(&file).find().unwrap_err();
        assert!(refused.contains("CLUSTER_NCCL_SO_PATH"), "{refused}");
        touch(&file);
        assert_eq!(places(&file).find(), Ok(file));
        let inside = dir.path().join(FILE);
        touch(&inside);
        assert_eq!(places(dir.path()).find(), Ok(inside), "a directory will do");
    }

    #[test]
    fn directories_are_searched_in_order_and_a_miss_says_how_to_get_it() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = dir.path().join("venv");
        let package = prefix
            .join("lib/python3.12/site-packages/nvidia/nccl/lib")
            .join(FILE);
        let mut places = Places {
            directories: package_directories(&prefix),
            ..Places::default()
        };
        let refused = places.find().unwrap_err();
        for part in [
            FILE,
            "LD_LIBRARY_PATH",
            "pip install",
            "CLUSTER_NCCL_SO_PATH",
        ] {
            assert!(refused.contains(part), "{part} in: {refused}");
        }
        touch(&package);
        places.directories = package_directories(&prefix);
        assert_eq!(places.find().as_ref(), Ok(&package));
        let first = dir.path().join("first").join(FILE);
        touch(&first);
        places.directories.insert(0, dir.path().join("first"));
        assert_eq!(places.find(), Ok(first));
    }

    #[test]
    fn the_environment_of_python_is_where_its_link_stands() {
        let dir = tempfile::tempdir().unwrap();
        touch(&dir.path().join("venv/bin/python3"));
        let path = [dir.path().join("empty"), dir.path().join("venv/bin")];
        assert_eq!(python_prefix(&path), Some(dir.path().join("venv")));
        assert_eq!(python_prefix(&path[..1]), None);
    }

    #[test]
    fn the_loaders_configuration_is_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b.conf"), "# comment\n/opt/b\ninclude x\n").unwrap();
        fs::write(dir.path().join("a.conf"), "/opt/a\n").unwrap();
        fs::write(dir.path().join("c.txt"), "/opt/c\n").unwrap();
        let found = loader_directories(dir.path());
        assert_eq!(found[..2], ["/opt/a", "/opt/b"].map(PathBuf::from));
        assert!(found.contains(&PathBuf::from("/usr/lib")));
    }

    #[test]
    fn versions_are_shown_as_people_write_them() {
        assert_eq!(
            (dotted(23007).as_str(), dotted(OLDEST).as_str()),
            ("2.30.7", "2.19.3")
        );
    }

    #[test]
    fn an_old_version_is_no_reason_to_refuse_ranks_with_a_gpu_each() {
        assert_eq!(check_sharing(22707, false), Ok(()));
        assert_eq!(check_sharing(23003, true), Ok(()));
        let refused = check_sharing(22707, true).unwrap_err();
        assert!(
            refused.contains("2.30.3") && refused.contains("2.27.7"),
            "{refused}"
        );
    }

    /// With NCCL on the host this loads it for real, which needs no GPU; without, the sentence is checked.
    #[test]
    fn nccl_is_loaded_where_it_is() {
        match find() {
            Ok(file) => {
                let version = load().unwrap();
                assert!(version >= OLDEST, "{}", file.display());
                assert_eq!(load(), Ok(version), "again");
            }
            Err(missing) => {
                println!("skipped: {missing}");
                assert_eq!(load().unwrap_err(), missing);
            }
        }
    }
}
