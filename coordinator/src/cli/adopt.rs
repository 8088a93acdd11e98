//! `cluster up` after a coordinator was killed: are there shards that wait, and can they be of use?
//!
//! Compares what they were started with and what is to be started now; where that agrees they are taken over, where
//! not they are ended, or left alone if the operator asked for nothing but them. How they are taken over is
//! the fleet's business. Invariant: shards of a process that lives are never touched.

use super::args::Up;
use super::find;
use super::prepare::{Drafts, Prepared, PreparedModel};
use crate::admin::entry::{self, Claim, Entry};
use crate::fleet::{
    Fault, Fleet, Keeper, Legacy, LocalHost, Program, ProgramFile, Ready, Setup, StartEvent, Terms,
};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use topology::examine::model::ModelDigest;
use topology::launch::process::ProcessId;
use topology::wire::{Loaded, ModelLocation};

/// Shards of one model that wait, and are wanted.
#[derive(Debug)]
pub(super) struct Heirs {
    dir: PathBuf,
    legacy: Legacy,
    /// Whether nothing else will do.
    only: bool,
}

/// Those of all models that have some, by number.
pub(super) type AllHeirs = BTreeMap<usize, Heirs>;

/// Checks flags, files and memory, and finds shards to take over, model by model.
///
/// # Errors
/// As [`Prepared::new`]; with `--adopt`, a sentence if there is nothing to take over.
pub(super) fn prepare(up: &Up) -> Result<(Prepared, AllHeirs)> {
    let Some((dir, left)) = find(up)? else {
        return Ok((Prepared::new(up)?, AllHeirs::new()));
    };
    let drafts = Drafts::new(up)?;
    let (mut known, mut heirs, mut refused) = (BTreeMap::new(), AllHeirs::new(), Vec::new());
    for (index, legacy) in left {
        // Where all have died there is nothing to keep.
        if legacy.alive().next().is_none() {
            continue;
        }
        match wanted(&drafts, (index, &legacy))? {
            Ok(model) => {
                let (dir, only) = (dir.clone(), up.adopt);
                heirs.insert(index, Heirs { dir, legacy, only });
                known.insert(index, model);
            }
            Err(why) => refused.push(why),
        }
    }
    if let Some(why) = refused.first() {
        ensure!(
            !up.adopt,
            "the shards that wait cannot be taken over: {why}; give the settings they were started with, or \
             leave out --adopt to end them and start afresh"
        );
        let ended = entry::end_orphans(&dir, |model| heirs.contains_key(&model))?;
        let why = refused.join("; ");
        tracing::warn!("{ended} shards of a process that was killed are ended: {why}");
    }
    // What is free is asked for now, when those that are not wanted hold none of it any more.
    Ok((drafts.prepared(known)?, heirs))
}

/// The model that the shards of `legacy` serve, if it is still number `index`; or why they are of no use.
fn wanted(
    drafts: &Drafts,
    (index, legacy): (usize, &Legacy),
) -> Result<Result<PreparedModel, String>> {
    let names = drafts.names();
    let Some(name) = names.get(index) else {
        let number = index + 1;
        return Ok(Err(format!(
            "model number {number} is not to be served any more"
        )));
    };
    let model = drafts.model(index, legacy.memory.clone())?;
    let now = terms(&model, drafts.first_shard(index))?;
    Ok(match legacy.terms.disagreement(&now) {
        None => Ok(model),
        Some(why) if names.len() == 1 => Err(why),
        Some(why) => Err(format!("model {name}: {why}")),
    })
}

/// The directory of a cluster of this name whose process was killed and whose shards wait, and what that left
/// to a successor, by model.
fn find(up: &Up) -> Result<Option<(PathBuf, BTreeMap<usize, Legacy>)>> {
    let places = find::places(up.run_dir.as_deref());
    let place = places.first().context("there is no run directory")?;
    let name = up.name.clone().unwrap_or_else(|| up.port.to_string());
    let entry = Entry::named(place, &name);
    if up.adopt {
        ensure!(
            up.name.is_some() || up.port != 0,
            "--adopt needs the --name or --port of the cluster whose shards wait"
        );
        match &entry {
            Some(entry) if entry.is_live => bail!(
                "there is nothing to adopt: {} has its shards; where it does not answer, `kill -9 {}` ends \
                 it and leaves them",
                entry.state,
                entry.state.pid
            ),
            Some(entry) if entry.orphans > 0 => {}
            _ => bail!(
                "there is nothing to adopt: no shards of a cluster {name} wait in {}; leave out --adopt",
                place.display()
            ),
        }
    }
    let waiting = entry.filter(|entry| entry.orphans > 0);
    Ok(waiting.map(|entry| (entry.dir.clone(), Legacy::read(&entry.dir))))
}

/// What must not have changed; `first_shard` is the number of the model's first.
fn terms(prepared: &PreparedModel, first_shard: u32) -> Result<Terms> {
    Ok(Terms {
        version: super::long_version().to_owned(),
        program: ProgramFile::own()?,
        model: model(&prepared.load.model)?,
        load: prepared.load.clone(),
        kv_cache: prepared.kv_cache_asked(),
        devices: prepared.placement.devices.clone(),
        cpu_isa: prepared.cpu_isa().to_owned(),
        first_shard,
    })
}

/// Digests of the small files and of weights' headers, and when weights were last written: reading all of
/// them would take as long as loading.
fn model(location: &ModelLocation) -> Result<String> {
    let ModelLocation::Directory(dir) = location else {
        return Ok("built-in".to_owned());
    };
    let digest = ModelDigest::read(dir, false, &|_, _| ()).map_err(anyhow::Error::msg)?;
    let mut text = digest.summary();
    for file in digest.files.keys() {
        let path = Path::new(dir).join(file);
        let about = fs::metadata(&path);
        let about = about.with_context(|| format!("cannot read {}", path.display()))?;
        let (seconds, nanos) = (about.mtime(), about.mtime_nsec());
        let _ = write!(text, " {file} {seconds}.{nanos:09}"); // strings do not fail
    }
    Ok(text)
}

/// What a model takes from the cluster before this one, and leaves to the one after.
#[derive(Debug, Default)]
pub(super) struct Succession {
    /// Shards to take over.
    pub(super) heirs: Option<Heirs>,
    /// What keeps shards for a successor, if they may wait for one.
    pub(super) keeper: Option<Keeper>,
}

/// Takes `heirs`, if nobody else has, and keeps shards on this machine; `claim` is this process's. One for each
/// model.
///
/// # Errors
/// If the shards that were found are another process's now, or a model cannot be read any more.
pub(super) fn successions(
    (up, prepared): (&Up, &Prepared),
    claim: &Claim,
    mut heirs: AllHeirs,
) -> Result<Vec<Succession>> {
    let left = Legacy::read(claim.dir());
    let is_theirs = |(index, heirs): (&usize, &Heirs)| left.get(index) == Some(&heirs.legacy);
    ensure!(
        heirs.iter().all(is_theirs),
        "the shards that waited were taken over by another process just now"
    );
    Legacy::remove(claim.dir(), |model| heirs.contains_key(&model));
    // Through `ssh` a shard ends with its connection.
    let is_remote = prepared.topology.as_ref().is_some_and(|topology| {
        let mut nodes = topology.nodes.iter();
        nodes.any(|node| node.ssh.is_some())
    });
    let is_kept = up.shard_grace_period > 0 && !is_remote;
    let successions = prepared.models.iter().enumerate().map(|(index, model)| {
        let heirs = heirs.remove(&index);
        let legacy = heirs.as_ref().map(|heirs| &heirs.legacy);
        let keeper = is_kept.then(|| keeper(up, (index, model), claim, legacy));
        Ok(Succession {
            keeper: keeper.transpose()?,
            heirs,
        })
    });
    successions.collect()
}

/// Keeps the shards of model number `index`, the first of which are those of `legacy`.
fn keeper(
    up: &Up,
    (index, model): (usize, &PreparedModel),
    claim: &Claim,
    legacy: Option<&Legacy>,
) -> Result<Keeper> {
    let shards = (0..).zip(&claim.state().ranks);
    let own = shards.filter(|(_, shard)| shard.model == index);
    let (numbers, logs): (Vec<u32>, Vec<PathBuf>) = own
        .map(|(number, shard)| (number, shard.log.clone()))
        .unzip();
    let first_shard = numbers.first().copied().unwrap_or_default();
    Ok(Keeper {
        dir: claim.dir().to_owned(),
        model: index,
        terms: terms(model, first_shard)?,
        memory: model.memory.clone(),
        hold_seconds: up.shard_grace_period,
        generation: legacy.map_or(0, |legacy| legacy.generation + 1),
        ranks: legacy.map_or_else(|| vec![None; logs.len()], |legacy| legacy.ranks.clone()),
        logs,
    })
}

/// Starts shards, or takes over those that wait.
///
/// # Errors
/// As [`Fleet::start`] and [`Fleet::adopt`].
pub(super) async fn start(
    program: Program,
    mut setup: Setup,
    heirs: Option<&Heirs>,
    choose_blocks: impl FnOnce(&[Loaded]) -> Result<u32, String>,
    mut tell: impl FnMut(StartEvent) + Send,
) -> Result<(Fleet, Ready), Fault> {
    let Some(Heirs { dir, legacy, only }) = heirs else {
        return Fleet::start(LocalHost::new(program)?, setup, choose_blocks, tell).await;
    };
    setup.generation = legacy.generation + 1;
    let host = match LocalHost::take_over(program, legacy) {
        Ok(host) => match Fleet::adopt(host, setup, legacy, &mut tell).await? {
            Ok(adopted) => return Ok(adopted),
            Err((host, given_back)) => {
                setup = given_back;
                host
            }
        },
        Err(refused) => {
            let (program, fault) = *refused;
            if *only {
                return Err(fault);
            }
            let ranks = legacy.alive().map(|(_, holder)| holder.process);
            ranks.for_each(ProcessId::kill);
            tracing::warn!("the shards of a process that was killed are ended: {fault}");
            LocalHost::new(program)?
        }
    };
    tracing::warn!("no shard in {} came to be taken over", dir.display());
    Fleet::start(host, setup, choose_blocks, tell).await
}
