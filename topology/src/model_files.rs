//! Where a model's files come from: a directory, or the binary itself.
//!
//! Everything that reads `config.json`, tokenizer files or weights goes through [`ModelFiles`], so
//! that the built-in model takes the same path as any other. Reads whole small files and ranges of
//! large ones; maps nothing into memory (the shard does, with [`ModelFiles::path`]).
//!
//! Invariant: a file name is one path component, so no name from a file's contents can leave the
//! model's directory; and nothing is read whole beyond a named limit.

use crate::wire::ModelLocation;
use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// Largest JSON configuration or index file in bytes. The largest published index is about 1 MB.
pub const MAX_JSON_BYTES: u64 = 16 << 20;

/// Largest file that is read whole, in bytes. Published `tokenizer.json` files reach 35 MB.
pub const MAX_WHOLE_BYTES: u64 = 256 << 20;

/// One file of the model inside the binary.
#[derive(Clone, Copy)]
pub struct BuiltInFile {
    /// Its name, as in a model directory.
    pub name: &'static str,
    /// Its contents.
    pub bytes: &'static [u8],
}

impl fmt::Debug for BuiltInFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The contents are megabytes; their length says enough.
        f.debug_struct("BuiltInFile")
            .field("name", &self.name)
            .field("bytes", &self.bytes.len())
            .finish()
    }
}

/// A model's files.
#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// A directory in the usual published layout.
    Directory(PathBuf),
    /// The model inside the binary.
    BuiltIn(&'static [BuiltInFile]),
}

/// Why a file of a model could not be read. `Display` is a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// The directory is not there.
    #[error("the model directory {0} does not exist or is not a directory")]
    NoDirectory(PathBuf),
    /// The file is not there.
    #[error("{place} has no file {file}")]
    Missing {
        /// The file's name.
        file: String,
        /// The directory, or the built-in model.
        place: String,
    },
    /// The file is larger than what is read whole.
    #[error("{file} has {found} bytes, more than the limit of {limit} for this kind of file")]
    TooLarge {
        /// The file's name.
        file: String,
        /// Its size in bytes.
        found: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A range goes beyond the end.
    #[error("{file} has {found} bytes, but bytes {wanted:?} of it are needed")]
    TooShort {
        /// The file's name.
        file: String,
        /// Its size in bytes.
        found: u64,
        /// The bytes asked for.
        wanted: Range<u64>,
    },
    /// The name would leave the model's directory.
    #[error("`{0}` is not a plain file name; a model's files lie directly in its directory")]
    Name(String),
    /// The operating system refused.
    #[error("cannot read {file}: {source}")]
    Io {
        /// The file's name.
        file: String,
        /// What the operating system said.
        source: io::Error,
    },
}

impl ModelFiles {
    /// The files a shard was told to load; `built_in` is what its binary carries.
    ///
    /// # Errors
    /// [`ModelFileError::NoDirectory`] if the directory is not there.
    pub fn open(
        location: &ModelLocation,
        built_in: &'static [BuiltInFile],
    ) -> Result<Self, ModelFileError> {
        match location {
            ModelLocation::BuiltIn => Ok(Self::BuiltIn(built_in)),
            ModelLocation::Directory(path) => Self::directory(path),
        }
    }

    /// The files of a directory.
    ///
    /// # Errors
    /// [`ModelFileError::NoDirectory`] if it is not there.
    pub fn directory(path: impl Into<PathBuf>) -> Result<Self, ModelFileError> {
        let path = path.into();
        if path.is_dir() {
            Ok(Self::Directory(path))
        } else {
            Err(ModelFileError::NoDirectory(path))
        }
    }

    /// Whether the model has a file of this name.
    pub fn exists(&self, name: &str) -> bool {
        self.len(name).is_ok()
    }

    /// Names of everything in the directory, sorted; names that are not UTF-8 left out, for no
    /// configuration can refer to them.
    ///
    /// # Errors
    /// [`ModelFileError`] if the directory cannot be listed.
    pub fn names(&self) -> Result<Vec<String>, ModelFileError> {
        let mut names: Vec<String> = match self {
            Self::BuiltIn(files) => files.iter().map(|file| file.name.to_owned()).collect(),
            Self::Directory(directory) => {
                let list = || -> io::Result<Vec<_>> { fs::read_dir(directory)?.collect() };
                let entries = list().map_err(|source| ModelFileError::Io {
                    file: directory.display().to_string(),
                    source,
                })?;
                let names = entries.into_iter().map(|entry| entry.file_name());
                names.filter_map(|name| name.into_string().ok()).collect()
            }
        };
        names.sort_unstable();
        Ok(names)
    }

    /// Size of a file in bytes.
    ///
    /// # Errors
    /// [`ModelFileError`] if it is missing, not a file, or its name is not a plain one.
    pub fn len(&self, name: &str) -> Result<u64, ModelFileError> {
        match self {
            Self::BuiltIn(_) => Ok(self.built_in(name)?.len() as u64),
            Self::Directory(directory) => {
                check_name(name)?;
                let metadata = fs::metadata(directory.join(name)).map_err(|e| self.io(name, e))?;
                // A pipe or device would make a later read wait for ever.
                if metadata.is_file() {
                    Ok(metadata.len())
                } else {
                    Err(self.missing(name))
                }
            }
        }
    }

    /// A whole file, at most [`MAX_WHOLE_BYTES`]. Borrowed where it is part of the binary.
    ///
    /// # Errors
    /// [`ModelFileError`] if it is missing, too large or unreadable.
    pub fn read(&self, name: &str) -> Result<Cow<'static, [u8]>, ModelFileError> {
        self.read_up_to(name, MAX_WHOLE_BYTES)
    }

    /// A configuration or index file, at most [`MAX_JSON_BYTES`].
    ///
    /// # Errors
    /// [`ModelFileError`] if it is missing, too large or unreadable.
    pub fn read_json(&self, name: &str) -> Result<Cow<'static, [u8]>, ModelFileError> {
        self.read_up_to(name, MAX_JSON_BYTES)
    }

    /// Bytes `range` of a file.
    ///
    /// # Errors
    /// [`ModelFileError`] if the file is missing, ends before the range does, or if the range is
    /// longer than [`MAX_WHOLE_BYTES`].
    pub fn read_range(
        &self,
        name: &str,
        range: Range<u64>,
    ) -> Result<Cow<'static, [u8]>, ModelFileError> {
        let found = self.len(name)?;
        if range.start > range.end || range.end > found {
            let file = name.to_owned();
            let wanted = range;
            return Err(ModelFileError::TooShort {
                file,
                found,
                wanted,
            });
        }
        let wanted = range.end - range.start;
        check_size(name, wanted, MAX_WHOLE_BYTES)?;
        match self {
            Self::BuiltIn(_) => {
                let bytes = self.built_in(name)?;
                // In bounds: the range was checked against the length of these bytes.
                let start = usize::try_from(range.start).unwrap_or(usize::MAX);
                let end = usize::try_from(range.end).unwrap_or(usize::MAX);
                Ok(Cow::Borrowed(bytes.get(start..end).unwrap_or_default()))
            }
            Self::Directory(directory) => {
                let read = || -> io::Result<Vec<u8>> {
                    let mut file = File::open(directory.join(name))?;
                    file.seek(SeekFrom::Start(range.start))?;
                    let mut bytes = vec![0; usize::try_from(wanted).map_err(io::Error::other)?];
                    file.read_exact(&mut bytes)?;
                    Ok(bytes)
                };
                read().map(Cow::Owned).map_err(|e| self.io(name, e))
            }
        }
    }

    /// The first `bytes` bytes of a file, or all of it where it is shorter.
    ///
    /// # Errors
    /// [`ModelFileError`] if the file is missing or unreadable.
    pub fn read_prefix(
        &self,
        name: &str,
        bytes: u64,
    ) -> Result<Cow<'static, [u8]>, ModelFileError> {
        let end = self.len(name)?.min(bytes);
        self.read_range(name, 0..end)
    }

    /// Where the file is on disk, for memory maps; `None` for the built-in model or a name that is
    /// not plain. Says nothing about whether the file exists.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::Directory(directory) if check_name(name).is_ok() => Some(directory.join(name)),
            Self::Directory(_) | Self::BuiltIn(_) => None,
        }
    }

    fn read_up_to(&self, name: &str, limit: u64) -> Result<Cow<'static, [u8]>, ModelFileError> {
        check_size(name, self.len(name)?, limit)?;
        match self {
            Self::BuiltIn(_) => Ok(Cow::Borrowed(self.built_in(name)?)),
            Self::Directory(directory) => {
                let mut bytes = Vec::new();
                // The file may have grown since its size was asked for: the limit holds anyway.
                let read = File::open(directory.join(name))
                    .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes));
                read.map_err(|e| self.io(name, e))?;
                check_size(name, bytes.len() as u64, limit)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }

    fn built_in(&self, name: &str) -> Result<&'static [u8], ModelFileError> {
        let files = match self {
            Self::BuiltIn(files) => *files,
            Self::Directory(_) => &[],
        };
        let file = files.iter().find(|file| file.name == name);
        file.map(|file| file.bytes)
            .ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> ModelFileError {
        ModelFileError::Missing {
            file: name.to_owned(),
            place: self.to_string(),
        }
    }

    fn io(&self, name: &str, source: io::Error) -> ModelFileError {
        if source.kind() == io::ErrorKind::NotFound {
            self.missing(name)
        } else {
            let file = name.to_owned();
            ModelFileError::Io { file, source }
        }
    }
}

impl fmt::Display for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::BuiltIn(_) => f.write_str("the built-in model"),
        }
    }
}

fn check_size(name: &str, found: u64, limit: u64) -> Result<(), ModelFileError> {
    if found <= limit {
        return Ok(());
    }
    let file = name.to_owned();
    Err(ModelFileError::TooLarge { file, found, limit })
}

/// One normal path component, and no separator of any platform.
fn check_name(name: &str) -> Result<(), ModelFileError> {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(only)) if only == name)
        && components.next().is_none()
        && !name.contains(['/', '\\', '\0']);
    if plain {
        Ok(())
    } else {
        Err(ModelFileError::Name(name.escape_debug().to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static BUILT_IN: [BuiltInFile; 2] = [
        BuiltInFile {
            name: "a.json",
            bytes: b"{}",
        },
        BuiltInFile {
            name: "b.bin",
            bytes: b"0123456789",
        },
    ];

    fn both() -> (tempfile::TempDir, [ModelFiles; 2]) {
        let directory = tempfile::tempdir().unwrap();
        for file in &BUILT_IN {
            fs::write(directory.path().join(file.name), file.bytes).unwrap();
        }
        let files = ModelFiles::directory(directory.path()).unwrap();
        (directory, [files, ModelFiles::BuiltIn(&BUILT_IN)])
    }

    #[test]
    fn a_directory_and_the_binary_answer_alike() {
        let (_keep, both) = both();
        for files in both {
            assert!(files.exists("a.json") && !files.exists("c.json"));
            assert_eq!(files.names().unwrap(), ["a.json", "b.bin"]);
            assert_eq!(files.len("b.bin").unwrap(), 10);
            assert_eq!(&*files.read("b.bin").unwrap(), b"0123456789");
            assert_eq!(&*files.read_json("a.json").unwrap(), b"{}");
            assert_eq!(&*files.read_range("b.bin", 2..5).unwrap(), b"234");
            assert_eq!(&*files.read_range("b.bin", 10..10).unwrap(), b"");
            assert_eq!(&*files.read_prefix("b.bin", 3).unwrap(), b"012");
            assert_eq!(&*files.read_prefix("b.bin", 99).unwrap(), b"0123456789");
            let short = files.read_range("b.bin", 5..11);
            assert!(matches!(
                short,
                Err(ModelFileError::TooShort { found: 10, .. })
            ));
            #[expect(clippy::reversed_empty_ranges, reason = "a range from a hostile file")]
            let reversed = files.read_range("b.bin", 5..4);
            assert!(matches!(reversed, Err(ModelFileError::TooShort { .. })));
            let missing = files.read("c.json");
            assert!(matches!(missing, Err(ModelFileError::Missing { .. })));
        }
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let (_keep, [files, _]) = both();
        for name in [
            "",
            ".",
            "..",
            "../b.bin",
            "/etc/passwd",
            "x/../b.bin",
            "./b.bin",
            "b\0",
            "a\\b",
        ] {
            assert!(
                matches!(files.read(name), Err(ModelFileError::Name(_))),
                "{name:?}"
            );
            assert_eq!(files.path(name), None, "{name:?}");
        }
        assert!(files.path("b.bin").unwrap().is_file());
    }

    #[test]
    fn large_files_and_odd_ones_are_refused() {
        let (keep, [files, built_in]) = both();
        let file = File::create(keep.path().join("big.json")).unwrap();
        file.set_len(MAX_JSON_BYTES + 1).unwrap();
        let refused = files.read_json("big.json");
        assert!(matches!(refused, Err(ModelFileError::TooLarge { .. })));
        assert_eq!(
            files.read("big.json").unwrap().len() as u64,
            MAX_JSON_BYTES + 1
        );
        fs::create_dir(keep.path().join("folder")).unwrap();
        assert!(!files.exists("folder"));
        assert_eq!(built_in.path("b.bin"), None);
        let gone = ModelFiles::directory(keep.path().join("nothing"));
        assert!(matches!(gone, Err(ModelFileError::NoDirectory(_))));
    }
}
