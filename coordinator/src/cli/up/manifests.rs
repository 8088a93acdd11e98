//! Models on other nodes are what the coordinator's manifest says: each node reads its own files.
//!
//! Asks nodes before the first shard of a model is started (those that wait, and are taken over, must not wait for it),
//! and only for models that have a `SHA256SUMS` here, whose files the coordinator has checked before. Invariant: on
//! every node, the files that shards read are those that were checked here.

use crate::cli::args::Up;
use crate::cli::prepare::{Prepared, PreparedModel};
use crate::cli::progress::{Meter, Notes};
use crate::fleet::RankSite;
use anyhow::{Context, Result, bail, ensure};
use futures_util::future::try_join_all;
use std::sync::Arc;
use std::time::Duration;
use topology::examine::{Answer, Question};
use topology::launch::ssh::Remote;
use topology::manifest::MANIFEST_FILE;
use topology::wire::ModelLocation;

/// How long a node may say nothing while it reads: a disk that has to wake up, or a network's.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// Checks the files of model number `index` here, unless they `are_checked`, and then has every node with ranks of it
/// check its own; `sites` are the model's.
///
/// # Errors
/// A sentence that names the node and the file.
pub(super) async fn verify(
    up: &Up,
    (index, prepared): (usize, &Prepared),
    sites: &[RankSite],
    are_checked: bool,
) -> Result<()> {
    let model = &prepared.models[index];
    if !are_checked {
        let (model, notes) = (model.model.clone(), Notes(up.log_format));
        let checked = tokio::task::spawn_blocking(move || model.verify(notes)).await;
        checked.context("reading the model panicked")??;
    }
    let (Some(topology), Some(manifest), ModelLocation::Directory(directory)) = (
        &prepared.topology,
        &model.model.manifest,
        &model.model.location,
    ) else {
        return Ok(());
    };
    let mut checks = Vec::new();
    let mut first = 0; // ranks of a node are side by side, and share the way to it
    for (node, ranks) in topology.models[index].hosts() {
        if let Some(remote) = &sites[first].remote {
            let node = topology.nodes[node].name.as_str();
            checks.push(check(up, (node, remote), model, (directory, manifest)));
        }
        first += ranks;
    }
    try_join_all(checks).await?;
    Ok(())
}

async fn check(
    up: &Up,
    (node, remote): (&str, &Arc<Remote>),
    model: &PreparedModel,
    (directory, manifest): (&str, &str),
) -> Result<()> {
    let name = model.model.name();
    let asked = async {
        remote.install().await?;
        let mut errand = remote.examine()?;
        let meter = Meter::new(
            Notes(up.log_format),
            format!("node {node}: checking {MANIFEST_FILE} of {name}"),
        );
        let question = Question::Model {
            directory: directory.to_owned(),
            deep: true,
        };
        let tell = |done, total| meter.tell(done, total);
        errand.ask_and_watch(&question, SILENCE_LIMIT, &tell).await
    };
    let answer = asked.await.with_context(|| format!("node {node}"))?;
    let digest = match answer {
        Answer::Model(Ok(digest)) => digest,
        Answer::Model(Err(why)) => bail!("node {node}: {why}"),
        other => bail!("node {node} answers another question: {other:?}"),
    };
    let found = digest.files.get(MANIFEST_FILE);
    ensure!(
        found.is_some_and(|found| found == manifest),
        "node {node}: {directory} has {} than this machine; copy the model anew",
        match found {
            Some(_) => format!("another {MANIFEST_FILE}"),
            None => format!("no {MANIFEST_FILE}, other"),
        }
    );
    Ok(())
}
