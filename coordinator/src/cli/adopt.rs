//! `cluster up` after a coordinator was killed: are there shards that wait, and can they be of use?
//!
//! Compares what they were started with and what is to be started now; where that agrees they are taken over, where
//! not they are ended, or left alone if the operator asked for nothing but them. How they are taken over is
//! the fleet's business. Invariant: shards of a process that lives are never touched.

use super::args::Up;
use super::find;
use super::prepare::Prepared;
use crate::admin::entry::{self, Claim, Entry};
use crate::fleet::{
    Fault, Fleet, Keeper, Legacy, LocalHost, Program, ProgramFile, Ready, Setup, StartEvent, Terms,
};
use anyhow::{Context, Result, bail, ensure};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use topology::examine::model::ModelDigest;
use topology::launch::process::ProcessId;
use topology::wire::{Loaded, ModelLocation};

/// Shards that wait, and are wanted.
#[derive(Debug)]
pub(super) struct Heirs {
    dir: PathBuf,
    legacy: Legacy,
    /// Whether nothing else will do.
    only: bool,
}

/// Checks flags, files and memory, and finds shards to take over.
///
/// # Errors
/// As [`Prepared::new`]; with `--adopt`, a sentence if there is nothing to take over.
pub(super) fn prepare(up: &Up) -> Result<(Prepared, Option<Heirs>)> {
    let Some((dir, legacy)) = find(up)? else {
        return Ok((Prepared::new(up)?, None));
    };
    let prepared = Prepared::with_memory(up, Some(legacy.memory.clone()))?;
    let disagreement = if prepared.models.len() > 1 {
        Some("several models are to be served".to_owned())
    } else {
        legacy.terms.disagreement(&terms(up, &prepared)?)
    };
    let Some(why) = disagreement else {
        let only = up.adopt;
        return Ok((prepared, Some(Heirs { dir, legacy, only })));
    };
    ensure!(
        !up.adopt,
        "the shards that wait cannot be taken over: {why}; give the settings they were started with, or \
         leave out --adopt to end them and start afresh"
    );
    give_up(&dir, &why)?;
    Ok((Prepared::new(up)?, None))
}

/// The directory of a cluster of this name whose process was killed and whose shards wait.
fn find(up: &Up) -> Result<Option<(PathBuf, Legacy)>> {
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
    Ok(waiting.and_then(|entry| Some((entry.dir.clone(), Legacy::read(&entry.dir)?))))
}

fn give_up(dir: &Path, why: &str) -> Result<()> {
    let ended = entry::end_orphans(dir)?;
    tracing::warn!("{ended} shards of a process that was killed are ended: {why}");
    Ok(())
}

/// What must not have changed.
fn terms(up: &Up, prepared: &Prepared) -> Result<Terms> {
    let prepared = prepared.first();
    Ok(Terms {
        version: super::long_version().to_owned(),
        program: ProgramFile::own()?,
        model: model(&prepared.load.model)?,
        load: prepared.load.clone(),
        kv_cache: (up.num_gpu_blocks_override, up.kv_cache_memory_bytes),
        devices: prepared.placement.devices.clone(),
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

/// What a cluster takes from the one before it, and leaves to the one after.
#[derive(Debug, Default)]
pub(super) struct Succession {
    /// Shards to take over.
    pub(super) heirs: Option<Heirs>,
    /// What keeps shards for a successor, if they may wait for one.
    pub(super) keeper: Option<Keeper>,
}

/// Takes `heirs`, if nobody else has, and keeps shards of one model on this machine; `claim` is this process's.
///
/// # Errors
/// If the shards that were found are another process's now, or the model cannot be read any more.
pub(super) fn succession(
    (up, prepared): (&Up, &Prepared),
    claim: &Claim,
    heirs: Option<Heirs>,
) -> Result<Succession> {
    if let Some(heirs) = &heirs {
        ensure!(
            Legacy::read(&heirs.dir).as_ref() == Some(&heirs.legacy),
            "the shards that waited were taken over by another process just now"
        );
    } else {
        Legacy::remove(claim.dir());
    }
    // Through `ssh` a shard ends with its connection.
    let is_remote = prepared.topology.as_ref().is_some_and(|topology| {
        let mut nodes = topology.nodes.iter();
        nodes.any(|node| node.ssh.is_some())
    });
    if up.shard_grace_period == 0 || is_remote || prepared.models.len() > 1 {
        return Ok(Succession {
            heirs,
            keeper: None,
        });
    }
    let ranks = claim.state().ranks.iter();
    let legacy = heirs.as_ref().map(|heirs| &heirs.legacy);
    let model = prepared.first();
    let keeper = Keeper {
        dir: claim.dir().to_owned(),
        logs: ranks.map(|rank| rank.log.clone()).collect(),
        terms: terms(up, prepared)?,
        memory: model.memory.clone(),
        hold_seconds: up.shard_grace_period,
        generation: legacy.map_or(0, |legacy| legacy.generation + 1),
        ranks: legacy.map_or_else(
            || vec![None; model.placement.devices.len()],
            |legacy| legacy.ranks.clone(),
        ),
    };
    Ok(Succession {
        keeper: Some(keeper),
        heirs,
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
