//! `cluster up` after a coordinator was killed: are there shards that wait, and can they be of use?
//!
//! Compares what they were started with and what is to be started now; where that agrees they are taken over, where
//! not they are ended, or left alone if the operator asked for nothing but them. How they are taken over is
//! the fleet's business. Invariant: shards of a process that lives are never touched.

use super::args::Up;
use super::prepare::{Drafts, Prepared, PreparedModel};
use super::progress::Notes;
use super::{find, nodes};
use crate::admin::entry::{self, Claim, Entry};
use crate::fleet::{
    Cause, Ended, Fault, Fleet, Keeper, Legacy, LocalHost, Program, ProgramFile, Ready, Setup,
    StartEvent, TakenOver, Terms,
};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use topology::examine::model::ModelDigest;
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
    // Where all have died there is nothing to keep.
    let left = left.into_iter();
    let left = left.filter(|(_, legacy)| legacy.alive().next().is_some());
    let (unreached, waiting): (BTreeMap<_, _>, BTreeMap<_, _>) =
        left.partition(|(index, _)| Legacy::is_unreached(*index));
    // Shards that wait have read their weights, and terms say whether those have changed.
    let drafts = Drafts::new(up, |index| waiting.contains_key(&index))?;
    let (mut known, mut heirs, mut refused) = (BTreeMap::new(), AllHeirs::new(), Vec::new());
    let mut afresh = Vec::new();
    for (index, legacy) in waiting {
        match wanted((up, &drafts), (index, &legacy))? {
            Ok(model) => {
                let (dir, only) = (dir.clone(), up.adopt);
                heirs.insert(index, Heirs { dir, legacy, only });
                known.insert(index, model);
            }
            Err(why) => {
                refused.push(why);
                afresh.extend(drafts.models().get(index).copied());
            }
        }
    }
    if let Some(why) = refused.first() {
        ensure!(
            !up.adopt,
            "the shards that wait cannot be taken over: {why}; give the settings they were started with, or \
             leave out --adopt to end them and start afresh"
        );
    }
    ensure!(
        !up.adopt || !heirs.is_empty(),
        "there is nothing to adopt: the shards that wait could not be told to end before; leave out --adopt"
    );
    for model in afresh {
        model.verify(Notes(up.log_format))?;
    }
    if !unreached.is_empty() || !refused.is_empty() {
        if !unreached.is_empty() {
            refused.push("an earlier process could not tell them to".to_owned());
        }
        let Ended { count, unreached } =
            entry::end_orphans(&dir, |model| heirs.contains_key(&model))?;
        let why = refused.join("; ");
        tracing::warn!("{count} shards of a process that was killed are ended: {why}");
        warn_of(&unreached);
    }
    // What is free is asked for now, when those that are not wanted hold none of it any more.
    Ok((drafts.prepared(known)?, heirs))
}

fn warn_of(unreached: &[String]) {
    for why in unreached {
        tracing::warn!("a shard of a process that was killed could not be told to end: {why}");
    }
}

/// The model that the shards of `legacy` serve, if it is still number `index`; or why they are of no use.
fn wanted(
    (up, drafts): (&Up, &Drafts),
    (index, legacy): (usize, &Legacy),
) -> Result<Result<PreparedModel, String>> {
    let models = drafts.models();
    let Some(asked) = models.get(index) else {
        let number = index + 1;
        return Ok(Err(format!(
            "model number {number} is not to be served any more"
        )));
    };
    let model = drafts.model(index, legacy.memory.clone())?;
    let places = nodes::places(drafts.topology.as_ref(), index);
    let now = terms((up, &model), places, drafts.first_shard(index))?;
    Ok(match legacy.terms.disagreement(&now) {
        None => Ok(model),
        Some(why) if models.len() == 1 => Err(why),
        Some(why) => Err(format!("model {}: {why}", asked.name())),
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

/// What must not have changed; `first_shard` is the number of the model's first, `places` are where its ranks are.
fn terms(
    (up, prepared): (&Up, &PreparedModel),
    places: Vec<String>,
    first_shard: u32,
) -> Result<Terms> {
    Ok(Terms {
        version: super::long_version().to_owned(),
        program: ProgramFile::own()?,
        model: model(&prepared.load.model)?,
        load: prepared.load.clone(),
        kv_cache: prepared.kv_cache_asked(),
        devices: prepared.placement.devices.clone(),
        places,
        cpu_isa: prepared.cpu_isa().to_owned(),
        hold_seconds: up.shard_grace_period,
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

/// Takes `heirs`, if nobody else has, and keeps shards; `claim` is this process's. One for each model.
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
    let may_live = |model: usize| {
        left.get(&model)
            .is_some_and(|legacy| legacy.alive().next().is_some())
    };
    let is_new = |model: usize| !heirs.contains_key(&model) && !Legacy::is_unreached(model);
    ensure!(
        !left.keys().any(|model| is_new(*model) && may_live(*model)),
        "shards of a process that was killed just now wait for another one; start again to take them over"
    );
    // Others are no use to anyone, unless they can still be told to end.
    Legacy::remove(claim.dir(), may_live);
    let is_kept = up.shard_grace_period > 0;
    let successions = prepared.models.iter().enumerate().map(|(index, model)| {
        let heirs = heirs.remove(&index);
        let legacy = heirs.as_ref().map(|heirs| &heirs.legacy);
        let places = nodes::places(prepared.topology.as_ref(), index);
        let keeper = is_kept.then(|| keeper(up, (index, model, places), claim, legacy));
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
    (index, model, places): (usize, &PreparedModel, Vec<String>),
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
        terms: terms((up, model), places, first_shard)?,
        memory: model.memory.clone(),
        generation: legacy.map_or(0, |legacy| legacy.generation + 1),
        ranks: legacy.map_or_else(|| vec![None; logs.len()], |legacy| legacy.ranks.clone()),
        logs,
    })
}

/// Starts shards, or takes over those that wait. Before any is started there is a `check`, which those that wait
/// passed when they were.
///
/// # Errors
/// What the check says. Within, as [`Fleet::start`] and [`TakenOver::form`].
pub(super) async fn start(
    program: Program,
    setup: Setup,
    (heirs, check): (Option<&Heirs>, impl Future<Output = Result<()>>),
    choose_blocks: impl FnOnce(&[Loaded]) -> Result<u32, String>,
    mut tell: impl FnMut(StartEvent) + Send,
) -> Result<Result<(Fleet, Ready), Fault>> {
    let (host, setup) = match take_over(program, setup, heirs, &mut tell).await {
        Ok(Ok(taken)) => {
            if taken.is_incomplete()
                && let Err(error) = check.await
            {
                taken.end().await;
                return Err(error);
            }
            return Ok(taken.form().await);
        }
        Ok(Err(fresh)) => fresh,
        Err(fault) => return Ok(Err(fault)),
    };
    check.await?;
    Ok(Fleet::start(host, setup, choose_blocks, tell).await)
}

/// Takes over the shards that wait; `Err(host)` where there are none, or none came.
async fn take_over(
    program: Program,
    mut setup: Setup,
    heirs: Option<&Heirs>,
    tell: impl FnMut(StartEvent) + Send,
) -> Result<Result<TakenOver, (LocalHost, Setup)>, Fault> {
    let Some(Heirs { dir, legacy, only }) = heirs else {
        return Ok(Err((LocalHost::new(program)?, setup)));
    };
    setup.generation = legacy.generation + 1;
    let fresh = match LocalHost::take_over(program, legacy) {
        Ok(host) => match Fleet::adopt(host, setup, legacy, tell).await {
            Ok(taken) => return Ok(Ok(taken)),
            Err(_) if *only => {
                let why =
                    "there is nothing to adopt: no shard came to be taken over; leave out --adopt";
                return Err(Fault::group(Cause::Launch(why.to_owned())));
            }
            Err((mut host, setup)) => {
                host.call(legacy);
                (host, setup)
            }
        },
        Err(refused) => {
            let (program, fault) = *refused;
            if *only {
                return Err(fault);
            }
            let Ended { count, unreached } = legacy.clone().end().await;
            tracing::warn!("{count} shards of a process that was killed are ended: {fault}");
            warn_of(&unreached);
            (LocalHost::new(program)?, setup)
        }
    };
    tracing::warn!("no shard in {} came to be taken over", dir.display());
    Ok(Err(fresh))
}
