//! Under what a model's shards were started, and whether that still holds.
//!
//! Compares values, and says what differs in words of the command line. Invariant: whatever would make a shard that is
//! started now another one than a shard that waits is a term.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::MetadataExt;
use topology::placement::Device;
use topology::wire::Load;

/// Everything that must be the same before and after, or shards cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// The program's version.
    pub version: String,
    /// The program's file.
    pub program: ProgramFile,
    /// Digest of the model's files.
    pub model: String,
    /// What every rank loads.
    pub load: Load,
    /// `--num-gpu-blocks-override` and `--kv-cache-memory-bytes`.
    pub kv_cache: (Option<u32>, Option<u64>),
    /// What ranks compute on, in order.
    pub devices: Vec<Device>,
    /// Where and by what ranks are reached, in order; empty where all are on this machine.
    pub places: Vec<String>,
    /// `--cpu-isa`.
    pub cpu_isa: String,
    /// `--shard-grace-period`: shards keep what they were started with.
    pub hold_seconds: u32,
    /// Number of the model's first shard among all of the cluster's: their logs are called after it.
    pub first_shard: u32,
}

/// A file, told from others without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramFile {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl ProgramFile {
    /// The program of this process.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn own() -> Result<Self> {
        // Also where the file has been replaced since.
        let about = fs::metadata("/proc/self/exe").context("ask about this program's file")?;
        Ok(Self {
            device: about.dev(),
            inode: about.ino(),
            bytes: about.len(),
            modified: (about.mtime(), about.mtime_nsec()),
        })
    }
}

impl Terms {
    /// Why shards that were started under these terms are of no use under `now`, in a sentence's second half.
    pub fn disagreement(&self, now: &Self) -> Option<String> {
        if self.version != now.version || self.program != now.program {
            return Some(format!(
                "the program is another one (it was {}, this is {})",
                self.version, now.version
            ));
        }
        if self.devices != now.devices {
            let list = |devices: &[Device]| {
                let names = devices.iter().map(ToString::to_string);
                names.collect::<Vec<_>>().join("; ")
            };
            let (was, is) = (list(&self.devices), list(&now.devices));
            return Some(format!("ranks were on {was}, and are to be on {is}"));
        }
        if self.places != now.places {
            let (was, is) = (self.places.join("; "), now.places.join("; "));
            return Some(format!("ranks were on {was}, and are to be on {is}"));
        }
        // Those beside it end when nothing is left for a successor, which one that keeps nothing cannot say.
        let is_fixed = !self.places.is_empty() || now.hold_seconds == 0;
        if is_fixed && self.hold_seconds != now.hold_seconds {
            let (was, is) = (self.hold_seconds, now.hold_seconds);
            return Some(format!("--shard-grace-period was {was}, and is {is}"));
        }
        if let Some(setting) = difference(&self.load, &now.load) {
            return Some(setting);
        }
        if self.model != now.model {
            return Some("the model's files have changed since they were loaded".to_owned());
        }
        if self.cpu_isa != now.cpu_isa {
            let (was, is) = (&self.cpu_isa, &now.cpu_isa);
            return Some(format!("--cpu-isa was {was}, and is {is}"));
        }
        if self.first_shard != now.first_shard {
            return Some("the models before it have other numbers of ranks".to_owned());
        }
        let asked = "--num-gpu-blocks-override or --kv-cache-memory-bytes is another".to_owned();
        (self.kv_cache != now.kv_cache).then_some(asked)
    }
}

/// The first setting that is not the same.
fn difference(was: &Load, is: &Load) -> Option<String> {
    let fields = |load| match serde_json::to_value(load) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (was, is) = (fields(was), fields(is));
    let name = was.keys().find(|name| was.get(*name) != is.get(*name))?;
    let shown = |fields: &serde_json::Map<_, _>| fields.get(name).map(ToString::to_string);
    let flag = name.replace('_', "-");
    let (was, is) = (shown(&was)?, shown(&is)?);
    Some(format!("{flag} was {was}, and is {is}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use topology::wire::ModelLocation;

    type Change = fn(&mut Terms);

    pub(crate) fn terms() -> Terms {
        Terms {
            version: "1 (build a)".into(),
            program: ProgramFile::own().unwrap(),
            model: "0123".into(),
            load: Load {
                model: ModelLocation::BuiltIn,
                tensor_parallel_size: 2,
                dtype: "auto".into(),
                quantization: "auto".into(),
                kv_cache_dtype: "auto".into(),
                block_size: 16,
                max_model_len: 64,
                max_num_batched_tokens: 64,
                max_num_seqs: 4,
                async_scheduling: true,
                enforce_eager: false,
            },
            kv_cache: (None, None),
            devices: vec![Device::Cpu {
                threads: 1,
                cores: vec![0],
            }],
            places: Vec::new(),
            cpu_isa: "auto".into(),
            hold_seconds: 60,
            first_shard: 2,
        }
    }

    #[test]
    fn how_long_shards_wait_may_change_but_not_elsewhere_and_not_to_nothing() {
        let said = |places: &[String], is| {
            let [mut old, mut new] = [terms(), terms()];
            old.places = places.to_owned();
            new.places = places.to_owned();
            new.hold_seconds = is;
            old.disagreement(&new)
        };
        assert_eq!(said(&[], 30), None);
        for (places, is) in [(&["node b".to_owned()][..], 30), (&[], 0)] {
            let why = format!("--shard-grace-period was 60, and is {is}");
            assert_eq!(said(places, is), Some(why));
        }
    }

    #[test]
    fn every_term_counts_and_is_named() {
        let old = terms();
        assert_eq!(old.disagreement(&terms()), None);
        let changes: [(Change, &str); 11] = [
            (|t| t.places.push("node b".into()), "are to be on node b"),
            (|t| t.version = "2".into(), "this is 2"),
            (|t| t.program.inode += 1, "program is another one"),
            (|t| t.model.push('4'), "model's files have changed"),
            (
                |t| t.load.max_model_len = 32,
                "max-model-len was 64, and is 32",
            ),
            (
                |t| t.load.dtype = "float16".into(),
                "dtype was \"auto\", and is \"float16\"",
            ),
            (
                |t| t.load.model = ModelLocation::Directory("/x".into()),
                "model was \"BuiltIn\"",
            ),
            (|t| t.kv_cache.0 = Some(7), "--num-gpu-blocks-override"),
            (
                |t| t.devices[0] = Device::Gpu { index: 3, ranks: 1 },
                "ranks were on cpu",
            ),
            (
                |t| t.cpu_isa = "avx2".into(),
                "--cpu-isa was auto, and is avx2",
            ),
            (|t| t.first_shard = 1, "other numbers of ranks"),
        ];
        for (change, said) in changes {
            let mut new = terms();
            change(&mut new);
            let why = old.disagreement(&new).unwrap();
            assert!(why.to_lowercase().contains(&said.to_lowercase()), "{why}");
        }
    }
}
