//! What a coordinator leaves to its successor: a file of the run directory for each model.
//!
//! Written when shards come, so that it is there whenever the process is killed; removed when the cluster
//! ends in order. With it a coordinator that is started on the same machine finds the shards, proves itself to
//! them by the same key, and tells whether it wants them. Decides nothing.
//!
//! Invariants: a file is never half written and nobody else's to read; its generation grows with every
//! coordinator before that one speaks to a shard.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use topology::fit::Memory;
use topology::ids::Rank;
use topology::launch::Hold;
use topology::launch::process::ProcessId;
use topology::link::{Certificate, Listener, SavedIdentity};
use topology::placement::Device;
use topology::wire::Load;

/// How the files' names begin and end in a cluster's directory; between them is the number of the model.
const FILE: (&str, &str) = ("legacy-", ".json");

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
    /// `--cpu-isa`.
    pub cpu_isa: String,
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

/// What is left to a successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Legacy {
    /// Counts the coordinators of these shards, from 0.
    pub generation: u32,
    /// Which run of the machine it is: process ids mean nothing in another.
    pub boot: String,
    /// Under which the shards were started.
    pub terms: Terms,
    /// Memory before they were: what they hold is missing from it now.
    pub memory: Memory,
    /// How long shards wait.
    pub hold_seconds: u32,
    /// Where shards look for a coordinator.
    pub address: SocketAddr,
    /// Whom they believe there.
    pub identity: SavedIdentity,
    /// By rank; `None` before its first process came.
    pub ranks: Vec<Option<Holder>>,
}

/// A shard that was admitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its identity.
    pub certificate: Certificate,
    /// Its process on this machine.
    pub process: ProcessId,
}

impl Legacy {
    /// What lies in a cluster's directory, by number of the model; without what is another version's, or from
    /// before the machine was started.
    pub fn read(dir: &Path) -> BTreeMap<usize, Self> {
        let legacies = files(dir).into_iter().filter_map(|model| {
            let legacy = fs::read(file(dir, model)).ok()?;
            let legacy: Self = serde_json::from_slice(&legacy).ok()?;
            (legacy.boot == boot()).then_some((model, legacy))
        });
        legacies.collect()
    }

    /// Removes those of models that are not `kept`: their shards that wait end.
    pub fn remove(dir: &Path, kept: impl Fn(usize) -> bool) {
        for model in files(dir).into_iter().filter(|model| !kept(*model)) {
            let file = file(dir, model);
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("cannot remove {}: {error}", file.display());
                }
                _ => {}
            }
        }
    }

    /// The shards that run, with their ranks.
    pub fn alive(&self) -> impl Iterator<Item = (Rank, &Holder)> {
        let ranks = (0..).map(Rank).zip(&self.ranks);
        let known = ranks.filter_map(|(rank, holder)| Some((rank, holder.as_ref()?)));
        known.filter(|(_, holder)| holder.process.is_running())
    }

    fn write(&self, file: &Path) -> Result<()> {
        let new = file.with_extension("new");
        let text = serde_json::to_vec_pretty(self).context("write down the legacy")?;
        let mut options = OpenOptions::new();
        let options = options.create(true).write(true).truncate(true).mode(0o600);
        // A key is in it: it is nobody else's from its first byte on.
        let written = options
            .open(&new)
            .and_then(|mut out| out.write_all(&text))
            .and_then(|()| fs::rename(&new, file));
        written.with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The file of a model.
fn file(dir: &Path, model: usize) -> PathBuf {
    let (begin, end) = FILE;
    dir.join(format!("{begin}{model}{end}"))
}

/// The models that have one.
fn files(dir: &Path) -> Vec<usize> {
    let (begin, end) = FILE;
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let models = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(begin)?.strip_suffix(end)?.parse().ok()
    });
    models.collect()
}

/// What the kernel calls this run of the machine; empty where it does not say.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Keeps the file of one model up to date.
#[derive(Debug)]
pub struct Keeper {
    /// The cluster's directory.
    pub dir: PathBuf,
    /// The model's number.
    pub model: usize,
    /// Files of shards' log lines, by rank.
    pub logs: Vec<PathBuf>,
    /// See [`Legacy::terms`].
    pub terms: Terms,
    /// See [`Legacy::memory`].
    pub memory: Memory,
    /// See [`Legacy::hold_seconds`]; more than 0.
    pub hold_seconds: u32,
    /// See [`Legacy::generation`].
    pub generation: u32,
    /// See [`Legacy::ranks`].
    pub ranks: Vec<Option<Holder>>,
}

impl Keeper {
    /// What a shard of `rank` is told.
    pub(super) fn hold(&self, rank: Rank) -> Option<Hold> {
        Some(Hold {
            seconds: self.hold_seconds,
            legacy: file(&self.dir, self.model),
            log: self.logs.get(rank.index())?.clone(),
        })
    }

    /// Takes in that a shard came.
    pub(super) fn admitted(&mut self, rank: Rank, certificate: Certificate, pid: u32) {
        let process = ProcessId::of(pid);
        if let Some(place) = self.ranks.get_mut(rank.index()) {
            *place = process.map(|process| Holder {
                certificate,
                process,
            });
        }
    }

    /// Writes the file. Where that fails the cluster serves on, and cannot be taken over.
    pub(super) fn write(&self, listener: &Listener) {
        let written = listener
            .local_addr()
            .map_err(Into::into)
            .and_then(|address| {
                let legacy = Legacy {
                    generation: self.generation,
                    boot: boot(),
                    terms: self.terms.clone(),
                    memory: self.memory.clone(),
                    hold_seconds: self.hold_seconds,
                    address,
                    identity: listener.identity().save(),
                    ranks: self.ranks.clone(),
                };
                legacy.write(&file(&self.dir, self.model))
            });
        if let Err(error) = written {
            tracing::warn!("if this process dies, its shards cannot be taken over: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use topology::wire::ModelLocation;

    type Change = fn(&mut Terms);

    fn terms() -> Terms {
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
            cpu_isa: "auto".into(),
            first_shard: 2,
        }
    }

    #[test]
    fn every_term_counts_and_is_named() {
        let old = terms();
        assert_eq!(old.disagreement(&terms()), None);
        let changes: [(Change, &str); 10] = [
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

    #[tokio::test]
    async fn what_is_left_is_this_users_alone_and_opens_the_same_door() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
        let mut keeper = Keeper {
            dir: dir.path().to_owned(),
            model: 1,
            logs: vec![dir.path().join("rank-0.log")],
            terms: terms(),
            memory: Memory::Shared { free_bytes: 5 },
            hold_seconds: 60,
            generation: 3,
            ranks: vec![None; 2],
        };
        assert!(keeper.hold(Rank(0)).is_some() && keeper.hold(Rank(1)).is_none());
        keeper.admitted(Rank(1), listener.certificate().clone(), std::process::id());
        keeper.write(&listener);
        let mode = fs::metadata(file(dir.path(), 1)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = || Legacy::read(dir.path());
        let legacy = read().remove(&1).unwrap();
        assert_eq!((legacy.generation, &legacy.ranks[0]), (3, &None));
        let alive: Vec<_> = legacy.alive().map(|(rank, _)| rank).collect();
        assert_eq!(alive, [Rank(1)]);
        let address = listener.local_addr().unwrap();
        assert_eq!(legacy.address, address);
        let again = || Listener::bind_again(address, legacy.identity.load().unwrap(), []);
        assert!(again().is_err(), "the first one has the port");
        assert_eq!(legacy.identity, listener.identity().save());
        let before = Legacy {
            boot: "another".into(),
            ..legacy
        };
        before.write(&file(dir.path(), 0)).unwrap();
        assert_eq!(
            read().into_keys().collect::<Vec<_>>(),
            [1],
            "the machine was started since the other"
        );
        Legacy::remove(dir.path(), |model| model == 1);
        assert_eq!(files(dir.path()), [1]);
        for _ in 0..2 {
            Legacy::remove(dir.path(), |_| false);
            assert!(read().is_empty() && files(dir.path()).is_empty());
        }
    }
}
