//! What a model's files are, in hashes that two nodes can compare.
//!
//! Configuration, tokenizer and index are read whole; weights by size and header, which names every tensor
//! with its type, shape and place, and whole only on demand: reading hundreds of gigabytes takes minutes.
//! Invariant: equal digests of a deep look mean equal files.

use crate::checkpoint::{Checkpoint, INDEX_FILE, MAX_HEADER_BYTES};
use crate::manifest::{self, MANIFEST_FILE, Tell, hash_file, hex};
use crate::model_files::ModelFiles;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::collections::BTreeMap;

/// By file: its hash, and for weights its size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelDigest {
    /// SHA-256 in hexadecimal; of weights `SIZE bytes, header HASH`, or `SIZE bytes, HASH` of a deep look.
    pub files: BTreeMap<String, String>,
}

/// Files besides weights that decide what a model says, and what vouches for all.
const SMALL_FILES: [&str; 6] = [
    MANIFEST_FILE,
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    INDEX_FILE,
];

impl ModelDigest {
    /// Reads the files of `directory`; weights whole if `deep`, and then as its manifest says, if it has one.
    ///
    /// # Errors
    /// A sentence: what is missing, broken, or not what the manifest lists.
    pub fn read(directory: &str, deep: bool, tell: Tell<'_>) -> Result<Self, String> {
        let files = ModelFiles::directory(directory).map_err(|e| e.to_string())?;
        let mut digest = Self::default();
        let verified = deep.then(|| manifest::verify(&files, tell)).transpose();
        let verified = verified.map_err(|e| format!("{files}: {e}"))?.flatten();
        let digests = verified
            .map(|verified| verified.digests)
            .unwrap_or_default();
        for name in SMALL_FILES {
            if files.exists(name) {
                let bytes = files.read(name).map_err(|e| e.to_string())?;
                digest.add(name, hex(&Sha256::digest(&bytes)));
            }
        }
        if !files.exists("config.json") {
            return Err(format!("{files} has no config.json"));
        }
        let checkpoint = Checkpoint::open(&files).map_err(|e| e.to_string())?;
        let total = checkpoint.files().iter().map(|file| file.bytes).sum();
        let done = Cell::new(0);
        let read_on = |bytes| {
            done.set(done.get() + bytes);
            tell(done.get(), total);
        };
        for file in checkpoint.files() {
            let name = file.name.as_str();
            let hash = match digests.get(name) {
                Some(known) => known.clone(),
                None if deep => whole(&files, name, &read_on)?,
                None => format!("header {}", header(&files, name)?),
            };
            digest.add(name, format!("{} bytes, {hash}", file.bytes));
        }
        Ok(digest)
    }

    fn add(&mut self, name: &str, hash: String) {
        self.files.insert(name.to_owned(), hash);
    }

    /// The files that are not the same in both, by name.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let names = self.files.keys().chain(other.files.keys());
        let mut names: Vec<_> = names
            .filter(|name| self.files.get(*name) != other.files.get(*name))
            .cloned()
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// One short hash of everything.
    pub fn summary(&self) -> String {
        let mut hasher = Sha256::new();
        for (name, hash) in &self.files {
            hasher.update(format!("{name}: {hash}\n"));
        }
        let mut text = hex(&hasher.finalize());
        text.truncate(12);
        text
    }
}

fn header(files: &ModelFiles, name: &str) -> Result<String, String> {
    let length = files.read_range(name, 0..8).map_err(|e| e.to_string())?;
    let length: [u8; 8] = (&*length).try_into().unwrap_or_default();
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(format!("{name} is not a valid safetensors file"));
    }
    let header = files.read_range(name, 0..8 + length);
    Ok(hex(&Sha256::digest(header.map_err(|e| e.to_string())?)))
}

fn whole(files: &ModelFiles, name: &str, read_on: &dyn Fn(u64)) -> Result<String, String> {
    let path = files.path(name).ok_or("it is no file")?;
    let mut hash = Sha256::new();
    let read = hash_file(&path, &mut hash, read_on);
    read.map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn model() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;
        let mut weights = (header.len() as u64).to_le_bytes().to_vec();
        weights.extend_from_slice(header);
        weights.extend_from_slice(&[1, 2, 3, 4]);
        fs::write(dir.path().join("model.safetensors"), weights).unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        dir
    }

    #[test]
    fn a_deep_look_holds_a_model_to_its_manifest() {
        let dir = model();
        let read = |deep| ModelDigest::read(dir.path().to_str().unwrap(), deep, &|_, _| {});
        let unlisted = read(true).unwrap();
        let hash = |name: &str| hex(&Sha256::digest(fs::read(dir.path().join(name)).unwrap()));
        let text = format!(
            "{}  config.json\n{}  model.safetensors\n",
            hash("config.json"),
            hash("model.safetensors")
        );
        fs::write(dir.path().join(MANIFEST_FILE), &text).unwrap();
        let listed = read(true).unwrap();
        assert_eq!(
            unlisted.differences(&listed),
            [MANIFEST_FILE],
            "the digests are the same"
        );
        assert_eq!(listed.files[MANIFEST_FILE], hash(MANIFEST_FILE));
        fs::write(dir.path().join("config.json"), "{  }").unwrap();
        assert!(read(false).is_ok(), "not looked at");
        let refused = read(true).unwrap_err();
        assert!(refused.contains("config.json is not the file"), "{refused}");
    }

    #[test]
    fn a_difference_is_named_and_one_in_the_weights_found_by_a_deep_look() {
        let (one, other) = (model(), model());
        let read = |dir: &tempfile::TempDir, deep| {
            ModelDigest::read(dir.path().to_str().unwrap(), deep, &|_, _| {}).unwrap()
        };
        assert_eq!(read(&one, true), read(&other, true));
        let file = other.path().join("model.safetensors");
        let mut weights = fs::read(&file).unwrap();
        *weights.last_mut().unwrap() ^= 1;
        fs::write(&file, &weights).unwrap();
        assert_eq!(read(&one, false), read(&other, false), "headers are equal");
        let differ = read(&one, true).differences(&read(&other, true));
        assert_eq!(differ, ["model.safetensors"]);
        assert_ne!(read(&one, true).summary(), read(&other, true).summary());
        fs::write(other.path().join("tokenizer.json"), "{}").unwrap();
        fs::write(other.path().join("config.json"), "{ }").unwrap();
        let differ = read(&one, false).differences(&read(&other, false));
        assert_eq!(differ, ["config.json", "tokenizer.json"]);
        fs::remove_file(&file).unwrap();
        let broken =
            ModelDigest::read(other.path().to_str().unwrap(), false, &|_, _| {}).unwrap_err();
        assert!(broken.contains("model.safetensors"), "{broken}");
        let missing = ModelDigest::read("/no/such", false, &|_, _| {}).unwrap_err();
        assert!(missing.contains("/no/such"), "{missing}");
    }
}
