//! `cluster doctor`: what would go wrong, found before anything is loaded.
//!
//! Asks every node with the program that would run there, and judges what they say: [`nodes`] asks,
//! [`judge`] judges, this prints. One line per finding, with what to do. Nothing is changed on a node but
//! that the program is put there, as `up` would.

mod judge;
mod nodes;

use super::args::{Command, Doctor};
use super::nodes as topology_file;
use super::prepare::Prepared;
use super::{EXIT_FAULT, EXIT_INPUT, complain, layers, say};
use crate::admin::status::table;
use anyhow::{Context, Result};
use nodes::{Place, Seen};
use serde::Serialize;
use std::ffi::OsString;
use std::process::ExitCode;
use topology::examine::model::ModelDigest;
use topology::placement::Device;
use topology::spec::cluster::Topology;

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// It will not work.
    Fail,
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    /// Which node, or all.
    place: String,
    /// What was looked at.
    check: &'static str,
    /// What was found, and what to do.
    text: String,
}

impl Finding {
    fn new(level: Level, place: &str, check: &'static str, text: impl Into<String>) -> Self {
        // One line, whatever a library or `ssh` wrote.
        let text: String = text.into();
        let words: Vec<_> = text.split_whitespace().collect();
        Self {
            level,
            place: place.to_owned(),
            check,
            text: words.join(" "),
        }
    }
}

/// What concerns all nodes together.
const EVERYWHERE: &str = "all";

/// Runs the command.
pub(super) fn run(flags: &Doctor) -> ExitCode {
    let findings = match examine(flags) {
        Ok(findings) => findings,
        Err(error) => return complain(&error, EXIT_INPUT),
    };
    let said = if flags.json {
        // The type holds nothing that JSON cannot say.
        say(&(serde_json::to_string_pretty(&findings).expect("texts") + "\n"))
    } else {
        say(&show(&findings))
    };
    match findings.iter().map(|finding| finding.level).max() {
        Some(Level::Fail) => ExitCode::from(EXIT_FAULT),
        _ => said,
    }
}

fn show(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let row = |finding: &Finding| {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        let Finding {
            place, check, text, ..
        } = finding;
        [level, place, check, text].map(str::to_owned)
    };
    let rows: Vec<_> = findings.iter().map(row).collect();
    let [ok, warn, fail] = [Level::Ok, Level::Warn, Level::Fail].map(count);
    format!("{}{ok} ok, {warn} warnings, {fail} failed\n", table(&rows))
}

/// All findings, in the order in which things happen when a cluster starts.
fn examine(flags: &Doctor) -> Result<Vec<Finding>> {
    let up = as_up(flags)?;
    let topology = topology_file::read(&up)?;
    let named = topology.as_ref().and_then(|t| t.model.path.clone());
    let model = named.or_else(|| up.model().map(|m| super::values::model(m).1.to_owned()));
    let places = match &topology {
        Some(topology) => of_file(topology),
        None => vec![Place::here()],
    };
    let asking = nodes::Asking {
        coordinator: topology.as_ref().map(|topology| topology.coordinator),
        model,
        deep: flags.deep,
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let own = own_model(&places, &asking);
    let (asked, own) = runtime.block_on(async {
        let own = tokio::task::spawn_blocking(own);
        (nodes::ask_all(&places, &asking).await, own.await)
    });
    runtime.shutdown_background();
    let (mut findings, seen) = asked?;
    let own = own.context("reading the model panicked")?;
    if let Some(Err(why)) = &own {
        let text = format!("{why}; the coordinator reads it too: put it here as well");
        findings.push(Finding::new(Level::Fail, EVERYWHERE, "model", text));
    }
    let reached: Vec<(&Place, &Seen)> = places
        .iter()
        .zip(&seen)
        .filter_map(|(place, seen)| Some((place, seen.as_ref()?)))
        .collect();
    for (place, seen) in &reached {
        findings.extend(judge::node(place, seen));
    }
    findings.extend(judge::together(&reached, own.and_then(Result::ok).as_ref()));
    // By node, each in the order of its checks; what concerns all comes last.
    let order = |finding: &Finding| places.iter().position(|p| p.name == finding.place);
    findings.sort_by_key(|finding| order(finding).unwrap_or(usize::MAX));
    if reached.len() == places.len() {
        findings.push(plan(&up));
    }
    Ok(findings)
}

/// Reads the model of this machine, where the coordinator needs it and no node is to be asked for it.
fn own_model(
    places: &[Place],
    asking: &nodes::Asking,
) -> impl FnOnce() -> Option<Result<ModelDigest, String>> + Send + use<> {
    let is_a_node = places.iter().any(|place| place.ssh.is_none());
    let directory = asking.model.clone().filter(|_| !is_a_node);
    let deep = asking.deep;
    move || directory.map(|directory| ModelDigest::read(&directory, deep))
}

/// The flags of an `up` that would start what is examined.
fn as_up(flags: &Doctor) -> Result<super::args::Up> {
    let mut argv: Vec<OsString> = vec!["cluster".into(), "up".into()];
    if let Some(file) = &flags.topology {
        argv.extend(["--topology".into(), file.into()]);
    }
    if let Some(model) = &flags.model {
        argv.extend(["--model".into(), model.into()]);
    }
    match layers::parse(argv).map_err(anyhow::Error::from)?.command {
        Command::Up(up) => Ok(*up),
        _ => anyhow::bail!("the command line is not read as `up`"),
    }
}

fn of_file(topology: &Topology) -> Vec<Place> {
    let devices = |index: usize| -> Vec<Device> {
        let ranks = topology.model.ranks.iter();
        let own = ranks.filter(|(node, _)| *node == index);
        own.map(|(_, device)| device.clone()).collect()
    };
    let nodes = topology.nodes.iter().enumerate();
    let place = |(index, node): (usize, &topology::spec::cluster::Node)| Place {
        name: node.name.clone(),
        address: Some(node.address),
        interface: node.interface.clone(),
        ssh: node.ssh.clone(),
        work_dir: node.work_dir.clone(),
        devices: devices(index),
    };
    // A node without ranks takes no part.
    let places = nodes.map(place).filter(|place| !place.devices.is_empty());
    places.collect()
}

/// Whether the model fits there, by the arithmetic of `cluster plan`.
fn plan(up: &super::args::Up) -> Finding {
    match Prepared::new(up) {
        Ok(prepared) => {
            let (ranks, blocks) = (prepared.placement.world_size(), prepared.report.num_blocks);
            let name = &prepared.model.names[0];
            let text = format!("{name} fits on {ranks} ranks with {blocks} KV blocks on each");
            Finding::new(Level::Ok, EVERYWHERE, "plan", text)
        }
        Err(error) => Finding::new(Level::Fail, EVERYWHERE, "plan", format!("{error:#}")),
    }
}
