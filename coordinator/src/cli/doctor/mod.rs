//! `cluster doctor`: what would go wrong, found before anything is loaded.
//!
//! Asks every node with the program that would run there, and judges what they say: [`nodes`] asks,
//! [`judge`] judges, this prints. One line per finding, with what to do. Nothing is changed on a node but
//! that the program is put there, as `up` would.

mod judge;
mod nodes;

use super::args::{Command, Doctor, LogFormat, Up};
use super::nodes as topology_file;
use super::prepare::{Prepared, PreparedModel};
use super::progress::{Meter, Notes};
use super::{EXIT_FAULT, EXIT_INPUT, complain, layers, say};
use crate::admin::status::table;
use anyhow::{Context, Result};
use nodes::{Place, Seen};
use serde::Serialize;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::ExitCode;
use topology::examine::model::ModelDigest;
use topology::placement::Device;
use topology::spec::cluster::{ModelSpec, Node, Topology};

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
    let places = match &topology {
        Some(topology) => of_file(topology, &topology_file::of_models(&up, topology)?),
        None => vec![Place {
            models: up.models().into_iter().map(directory).collect(),
            ..Place::here()
        }],
    };
    let asking = nodes::Asking {
        coordinator: topology.as_ref().map(|topology| topology.coordinator),
        deep: flags.deep,
        notes: Notes(LogFormat::Text),
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let own = own_models(&places, &asking);
    let groups = topology.as_ref().map_or_else(Vec::new, groups);
    let (asked, own) = runtime.block_on(async {
        let own = tokio::task::spawn_blocking(own);
        (nodes::ask_all(&places, &groups, &asking).await, own.await)
    });
    runtime.shutdown_background();
    let nodes::Asked {
        mut findings,
        seen,
        measured,
    } = asked?;
    let own = own.context("reading the models panicked")?;
    for why in own.values().filter_map(|digest| digest.as_ref().err()) {
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
    findings.extend(judge::together(&reached, (&own, &measured)));
    if topology.is_some() && groups.is_empty() {
        let text = "the ranks of each model are on one host and share its memory";
        findings.push(Finding::new(Level::Ok, EVERYWHERE, "all-reduce", text));
    }
    // By node, each in the order of its checks; what concerns all comes last.
    let order = |finding: &Finding| places.iter().position(|p| p.name == finding.place);
    findings.sort_by_key(|finding| order(finding).unwrap_or(usize::MAX));
    if reached.len() == places.len() {
        findings.push(plan(&up));
    }
    Ok(findings)
}

/// Reads the models of this machine, where the coordinator needs them and no node is to be asked for them.
fn own_models(
    places: &[Place],
    asking: &nodes::Asking,
) -> impl FnOnce() -> nodes::Digests + Send + use<> {
    let here = places.iter().filter(|place| place.ssh.is_none());
    let asked_here: BTreeSet<&String> = here.flat_map(|place| &place.models).collect();
    let all: BTreeSet<&String> = places.iter().flat_map(|place| &place.models).collect();
    let wanted: Vec<String> = all
        .difference(&asked_here)
        .map(|it| (*it).clone())
        .collect();
    let (deep, notes) = (asking.deep, asking.notes);
    move || {
        let digest = |directory: String| {
            let meter = Meter::new(notes, format!("{directory}: reading"));
            let tell = |done, total| meter.tell(done, total);
            let digest = ModelDigest::read(&directory, deep, &tell);
            (directory, digest)
        };
        wanted.into_iter().map(digest).collect()
    }
}

/// Of `NAME=DIR`.
fn directory(model: &str) -> String {
    super::values::model(model).1.to_owned()
}

/// The flags of an `up` that would start what is examined.
fn as_up(flags: &Doctor) -> Result<Up> {
    let mut argv: Vec<OsString> = vec!["cluster".into(), "up".into()];
    if let Some(file) = &flags.topology {
        argv.extend(["--topology".into(), file.into()]);
    }
    for model in &flags.model {
        argv.extend(["--model".into(), model.into()]);
    }
    match layers::parse(argv).map_err(anyhow::Error::from)?.command {
        Command::Up(up) => Ok(*up),
        _ => anyhow::bail!("the command line is not read as `up`"),
    }
}

/// The nodes between which ranks of a model exchange activations, by number among those of [`of_file`]: a group
/// for each set of nodes that any model has.
fn groups(topology: &Topology) -> Vec<Vec<usize>> {
    let taken = topology.models.iter().flat_map(ModelSpec::hosts);
    let taken: BTreeSet<usize> = taken.map(|(node, _)| node).collect();
    let joined = topology.models.iter().filter(|model| !model.is_one_host());
    let groups = joined.map(|model| {
        let nodes: BTreeSet<usize> = model.hosts().into_iter().map(|(node, _)| node).collect();
        let places = taken.iter().enumerate();
        let own = places.filter(|(_, node)| nodes.contains(node));
        own.map(|(place, _)| place).collect()
    });
    groups
        .collect::<BTreeSet<Vec<usize>>>()
        .into_iter()
        .collect()
}

/// The nodes that take part; `ups` are the flags of each model.
fn of_file(topology: &Topology, ups: &[Up]) -> Vec<Place> {
    let nodes = topology.nodes.iter().enumerate();
    let place = |(index, node): (usize, &Node)| {
        let (mut devices, mut models) = (Vec::new(), BTreeSet::new());
        let mut joins_nodes = false;
        for (model, up) in topology.models.iter().zip(ups) {
            let ranks = model.ranks.iter().filter(|(node, _)| *node == index);
            let own: Vec<Device> = ranks.map(|(_, device)| device.clone()).collect();
            if own.is_empty() {
                continue;
            }
            models.extend(up.models().into_iter().map(directory));
            joins_nodes |= !model.is_one_host();
            devices.extend(own);
        }
        Place {
            name: node.name.clone(),
            address: Some(node.address),
            interface: node.interface.clone(),
            ssh: node.ssh.clone(),
            work_dir: node.work_dir.clone(),
            models: models.into_iter().collect(),
            devices,
            joins_nodes,
        }
    };
    // A node without ranks takes no part.
    let places = nodes.map(place).filter(|place| !place.devices.is_empty());
    places.collect()
}

/// Whether the models fit there, by the arithmetic of `cluster plan`.
fn plan(up: &Up) -> Finding {
    let fits = |model: &PreparedModel| {
        let (ranks, blocks) = (model.placement.world_size(), model.report.num_blocks);
        let name = model.model.name();
        format!("{name} fits on {ranks} ranks with {blocks} KV blocks on each")
    };
    match Prepared::new(up) {
        Ok(prepared) => {
            let text: Vec<_> = prepared.models.iter().map(fits).collect();
            Finding::new(Level::Ok, EVERYWHERE, "plan", text.join("; "))
        }
        Err(error) => Finding::new(Level::Fail, EVERYWHERE, "plan", format!("{error:#}")),
    }
}
