//! `SHA256SUMS` beside a model's files: what each of them must be, in `sha256sum`'s own format.
//!
//! `sha256sum * > SHA256SUMS` in a trusted copy makes one; `sha256sum -c SHA256SUMS` checks the same by
//! hand. A model without one is served unchecked. Where there is one, every file it lists is read
//! once, in pieces and several files at a time, before anything of the model is used; weights it does
//! not list are refused. Lines about sub-directories are passed over: nothing there is ever read.
//!
//! Guards against incomplete copies and exchanged files, not against whoever can write the directory
//! while it is being served. Invariant: [`verify`] succeeds only if all listed files have their digest.

use crate::model_files::{ModelFileError, ModelFiles};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

/// The manifest's name.
pub const MANIFEST_FILE: &str = "SHA256SUMS";

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Most files that are read at a time; more do not make a disk faster.
const READERS: usize = 8;

/// Files that must be listed, by the end of their names.
const WEIGHTS: &str = ".safetensors";

/// What was found to be as the manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// SHA-256 of the manifest itself.
    pub manifest: String,
    /// SHA-256 by name of all files that it lists and that were meant, in hexadecimal.
    pub digests: BTreeMap<String, String>,
    /// Their bytes together.
    pub bytes: u64,
}

/// Hears how many bytes of how many were read. Called often, from several threads.
pub type Tell<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Why a model is not what its manifest says. Each is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A line is not in the format.
    #[error("{MANIFEST_FILE}:{line}: {reason}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file is another one.
    #[error(
        "{file} is not the file that {MANIFEST_FILE} lists: its SHA-256 is {found}, and must be {expected}; copy it again"
    )]
    Mismatch {
        /// The file's name.
        file: String,
        /// By the manifest.
        expected: String,
        /// Of what is there.
        found: String,
    },
    /// Weights that nobody vouches for.
    #[error(
        "{0} is not listed in {MANIFEST_FILE}; remove it, or list it if it belongs to the model (`sha256sum {0} >> {MANIFEST_FILE}`)"
    )]
    Unlisted(String),
    /// A file, or the manifest itself, cannot be read.
    #[error(transparent)]
    File(#[from] ModelFileError),
}

/// Compares a model's files with its manifest; `None` if it has none.
///
/// # Errors
/// [`ManifestError`] for the first file, by name, that is missing or another one.
pub fn verify(files: &ModelFiles, tell: Tell<'_>) -> Result<Option<Verified>, ManifestError> {
    verify_those(files, |_| true, tell)
}

/// The same without weights, which are nearly all there is to read: for whoever uses only the rest.
///
/// # Errors
/// As [`verify`].
pub fn verify_without_weights(files: &ModelFiles) -> Result<Option<Verified>, ManifestError> {
    verify_those(files, |name| !name.ends_with(WEIGHTS), &|_, _| ())
}

fn verify_those(
    files: &ModelFiles,
    is_meant: impl Fn(&str) -> bool,
    tell: Tell<'_>,
) -> Result<Option<Verified>, ManifestError> {
    let text = match files.read_json(MANIFEST_FILE) {
        Ok(text) => text,
        Err(ModelFileError::Missing { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut digests = parse(&text)?;
    let names = files.names()?;
    for name in names.into_iter().filter(|name| name.ends_with(WEIGHTS)) {
        if !digests.contains_key(&name) {
            return Err(ManifestError::Unlisted(name));
        }
    }
    digests.retain(|name, _| is_meant(name));
    let listed: Vec<(&String, &String)> = digests.iter().collect();
    // A file that is missing is found out when its turn comes.
    let sizes = listed.iter().filter_map(|(name, _)| files.len(name).ok());
    let (total, done) = (sizes.sum::<u64>(), AtomicU64::new(0));
    let read_on = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        tell(done, total);
    };
    let (next, first_wrong) = (AtomicUsize::new(0), Mutex::new(None));
    let bytes = thread::scope(|scope| {
        let read = || {
            let mut bytes = 0;
            while let Some((index, entry)) = take(&listed, &next) {
                match check(files, *entry, &read_on) {
                    Ok(length) => bytes += length,
                    Err(error) => {
                        // Later files need not be read; earlier ones are being read already.
                        next.store(listed.len(), Ordering::Relaxed);
                        keep_first(&first_wrong, index, error);
                    }
                }
            }
            bytes
        };
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let readers = cores.min(READERS).min(listed.len());
        let readers: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
        let bytes = readers
            .into_iter()
            .map(|it| it.join().expect("a reader does not panic"));
        bytes.sum::<u64>()
    });
    match first_wrong.into_inner().expect("a reader does not panic") {
        Some((_, error)) => Err(error),
        None => Ok(Some(Verified {
            manifest: hex(&Sha256::digest(&text)),
            digests,
            bytes,
        })),
    }
}

type Wrong = Option<(usize, ManifestError)>;

fn keep_first(kept: &Mutex<Wrong>, index: usize, error: ManifestError) {
    let mut kept = kept.lock().expect("a reader does not panic");
    if kept.as_ref().is_none_or(|(known, _)| index < *known) {
        *kept = Some((index, error));
    }
}

fn take<'a, T>(list: &'a [T], next: &AtomicUsize) -> Option<(usize, &'a T)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    list.get(index).map(|entry| (index, entry))
}

/// Digests by name.
fn parse(text: &[u8]) -> Result<BTreeMap<String, String>, ManifestError> {
    let mut listed = BTreeMap::new();
    for (line, text) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let wrong = |reason| ManifestError::Line { line, reason };
        let text = str::from_utf8(text).map_err(|_| wrong("it is not UTF-8"))?;
        let text = text.strip_suffix('\r').unwrap_or(text);
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let format =
            || wrong("a line must be a SHA-256 in hexadecimal, two spaces and a file name");
        let (digest, name) = text.split_at_checked(64).ok_or_else(format)?;
        let name = name
            .strip_prefix("  ")
            .or(name.strip_prefix(" *"))
            .ok_or_else(format)?;
        if name.is_empty() || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format());
        }
        // As `find` writes it.
        let name = name.strip_prefix("./").unwrap_or(name);
        if name.contains('/') || name == MANIFEST_FILE {
            continue;
        }
        let before = listed.insert(name.to_owned(), digest.to_ascii_lowercase());
        if before.is_some() {
            return Err(wrong("the file is listed twice; keep one of the lines"));
        }
    }
    Ok(listed)
}

/// Compares one file; its size in bytes.
fn check(
    files: &ModelFiles,
    (name, expected): (&String, &String),
    read_on: &dyn Fn(u64),
) -> Result<u64, ManifestError> {
    let length = files.len(name)?;
    let mut hash = Sha256::new();
    match files.path(name) {
        Some(path) => {
            hash_file(&path, &mut hash, read_on).map_err(|source| ModelFileError::Io {
                file: name.clone(),
                source,
            })?;
        }
        None => hash.update(files.read(name)?),
    }
    let found = hex(&hash.finalize());
    if found == *expected {
        return Ok(length);
    }
    Err(ManifestError::Mismatch {
        file: name.clone(),
        expected: expected.clone(),
        found,
    })
}

/// Feeds a file to `hash`, in pieces of which each is told.
pub(crate) fn hash_file(path: &Path, hash: &mut Sha256, read_on: &dyn Fn(u64)) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                hash.update(&piece[..count]);
                read_on(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// In hexadecimal.
pub(crate) fn hex(digest: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    /// Of nothing, from the standard's examples.
    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    /// Of `abc`.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn directory(files: &[(&str, &[u8])]) -> (tempfile::TempDir, ModelFiles) {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(directory.path().join(name), bytes).unwrap();
        }
        let files = ModelFiles::directory(directory.path()).unwrap();
        (directory, files)
    }

    fn refusal(manifest: &str) -> String {
        let files = [
            (MANIFEST_FILE, manifest.as_bytes()),
            ("model.safetensors", b"abc"),
            ("config.json", b""),
        ];
        verify(&directory(&files).1, &|_, _| {})
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_model_without_a_manifest_is_not_checked() {
        let (_keep, files) = directory(&[("model.safetensors", b"abc")]);
        assert_eq!(verify(&files, &|_, _| {}).unwrap(), None);
        let none = ModelFiles::BuiltIn(&[]);
        assert_eq!(verify(&none, &|_, _| {}).unwrap(), None);
    }

    #[test]
    fn what_sha256sum_writes_is_verified_however_many_files_there_are() {
        let (keep, files) = directory(&[("config.json", b""), ("tokenizer.json", b"abc")]);
        let mut bytes = 3;
        for part in 0..20_u8 {
            let length = usize::from(part) * 150_000;
            let name = format!("model-{part:05}-of-00020.safetensors");
            fs::write(keep.path().join(name), vec![part; length]).unwrap();
            bytes += length as u64;
        }
        for command in ["sha256sum *", "sha256sum --binary ./*"] {
            let sums = Command::new("sh")
                .args(["-c", command])
                .current_dir(keep.path())
                .output()
                .unwrap();
            let mut text = String::from_utf8(sums.stdout).unwrap();
            assert_eq!(text.lines().count(), 22, "{command}");
            text.replace_range(..64, &text[..64].to_ascii_uppercase());
            fs::write(keep.path().join(MANIFEST_FILE), text).unwrap();
            let (heard, seen) = (Mutex::new((0, 0)), AtomicUsize::new(0));
            let tell = |done: u64, total: u64| {
                let mut heard = heard.lock().unwrap();
                *heard = (heard.0.max(done), total);
                seen.fetch_add(1, Ordering::Relaxed);
            };
            let found = verify(&files, &tell).unwrap().unwrap();
            assert_eq!((found.digests.len(), found.bytes), (22, bytes), "{command}");
            assert_eq!(heard.into_inner().unwrap(), (bytes, bytes), "all is told");
            assert!(seen.into_inner() > 22, "large files are told in pieces");
            fs::remove_file(keep.path().join(MANIFEST_FILE)).unwrap();
        }
    }

    #[test]
    fn another_file_is_named_with_both_digests() {
        let text = format!("{EMPTY}  config.json\n{EMPTY}  model.safetensors\n");
        let refused = refusal(&text);
        for part in ["model.safetensors", EMPTY, ABC, "copy it again"] {
            assert!(refused.contains(part), "{refused}");
        }
        // It is not looked at where only the rest is of interest.
        let names = [MANIFEST_FILE, "model.safetensors", "config.json"];
        let spoiled = |config| {
            directory(&[
                (names[0], text.as_bytes()),
                (names[1], b"abc"),
                (names[2], config),
            ])
        };
        let (_keep, files) = spoiled(b"");
        let rest = verify_without_weights(&files).unwrap().unwrap();
        assert_eq!(
            rest.digests.into_keys().collect::<Vec<_>>(),
            ["config.json"]
        );
        let (_keep, files) = spoiled(b"abc");
        assert!(verify_without_weights(&files).is_err());
        // The first by name, whoever finds it first.
        let text = format!("{ABC}  config.json\n{EMPTY}  model.safetensors\n");
        assert!(
            refusal(&text).starts_with("config.json"),
            "{}",
            refusal(&text)
        );
    }

    #[test]
    fn weights_must_be_listed_and_what_is_listed_must_be_there() {
        let refused = refusal(&format!("{EMPTY}  config.json\n"));
        assert!(
            refused.starts_with("model.safetensors is not listed"),
            "{refused}"
        );
        let refused = refusal(&format!("{ABC}  model.safetensors\n{ABC}  gone.json\n"));
        assert!(refused.contains("has no file gone.json"), "{refused}");
        // The manifest does not list itself to any use, and nobody reads sub-directories.
        let text =
            format!("{ABC}  model.safetensors\n{ABC}  {MANIFEST_FILE}\n{ABC}  a/b\n{ABC}  ../x\n");
        let files = [
            (MANIFEST_FILE, text.as_bytes()),
            ("model.safetensors", b"abc"),
        ];
        let (_keep, files) = directory(&files);
        let found = verify(&files, &|_, _| {}).unwrap().unwrap();
        assert_eq!((found.digests.len(), found.bytes), (1, 3));
    }

    #[test]
    fn lines_that_are_none_are_refused_with_their_number() {
        for (line, reason) in [
            ("abc  x".to_owned(), "SHA-256"),
            (format!("{EMPTY} x"), "two spaces"),
            (format!("{EMPTY}  "), "file name"),
            (format!("{}g  x", &EMPTY[1..]), "hexadecimal"),
            (format!("SHA256 (x) = {EMPTY}"), "two spaces"),
            (format!("\\{EMPTY}  x"), "hexadecimal"),
            (format!("{}ä  x", &EMPTY[1..]), "hexadecimal"),
            (
                format!("{EMPTY}  config.json\n{EMPTY}  ./config.json"),
                "twice",
            ),
        ] {
            let refused = refusal(&format!("# made by hand\n\n{line}\n"));
            let number = if reason == "twice" { 4 } else { 3 };
            assert!(
                refused.starts_with(&format!("SHA256SUMS:{number}: ")),
                "{refused}"
            );
            assert!(refused.contains(reason), "{line}: {refused}");
        }
    }
}
