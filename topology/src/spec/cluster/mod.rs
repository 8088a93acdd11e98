//! `cluster.toml`: which nodes there are, how they are reached, and which devices a model takes.
//!
//! Text to values: nothing is looked up or connected to. Whoever reads the error is the one who wrote the
//! file, so it names file, line and key. Invariants: names of nodes are unique; a model's ranks
//! are devices that their nodes have, none twice, those of a node side by side.

mod raw;

use crate::launch::ssh::Target;
use crate::placement::Device;
use raw::{RawFile, Wrong};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Longest file in bytes: a thousand nodes fit.
const MAX_FILE_BYTES: usize = 1 << 20;

/// What is wrong with a topology file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {reason}", .file.display())]
pub struct TopologyError {
    /// Which file.
    pub file: PathBuf,
    /// Where, from 1.
    pub line: usize,
    /// Which key, and what to change.
    pub reason: String,
}

/// What a topology file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The address of the coordinator's machine that nodes reach.
    pub coordinator: IpAddr,
    /// At least one.
    pub nodes: Vec<Node>,
    /// The model and its ranks.
    pub model: ModelSpec,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Unique.
    pub name: String,
    /// Where other nodes reach it.
    pub address: IpAddr,
    /// The network interface that NCCL takes; `None` leaves it to NCCL.
    pub interface: Option<String>,
    /// How to get there; `None` is the coordinator's own machine.
    pub ssh: Option<Target>,
    /// Where the program is put there.
    pub work_dir: String,
    /// One rank may be on each.
    pub devices: Vec<Device>,
}

/// A model, and on what it is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// What the API calls it.
    pub name: Option<String>,
    /// Its directory, the same on all machines; `None` is the built-in model.
    pub path: Option<String>,
    /// In rank order: index of the node, and the device.
    pub ranks: Vec<(usize, Device)>,
}

impl Topology {
    /// Reads the text of `file`.
    ///
    /// # Errors
    /// [`TopologyError`] that names line and key.
    pub fn parse(file: &Path, text: &str) -> Result<Self, TopologyError> {
        let wrong = |at: usize, reason: String| TopologyError {
            file: file.to_owned(),
            line: text[..at.min(text.len())].matches('\n').count() + 1,
            reason,
        };
        if text.len() > MAX_FILE_BYTES {
            return Err(wrong(
                0,
                format!("it is longer than {MAX_FILE_BYTES} bytes"),
            ));
        }
        let raw: RawFile = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            wrong(at, unreadable(&e, text, at))
        })?;
        raw.check()
            .map_err(|Wrong { at, reason }| wrong(at, reason))
    }

    /// Whether all ranks are on one machine.
    pub fn is_one_host(&self) -> bool {
        let mut nodes = self.model.ranks.iter().map(|(node, _)| node);
        let first = nodes.next();
        nodes.all(|node| Some(node) == first)
    }

    /// The nodes that have ranks, with how many, in rank order.
    pub fn hosts(&self) -> Vec<(&Node, usize)> {
        let ranks = self
            .model
            .ranks
            .chunk_by(|(one, _), (other, _)| one == other);
        ranks
            .map(|ranks| (&self.nodes[ranks[0].0], ranks.len()))
            .collect()
    }
}

/// toml's words, with the key where it does not name one.
fn unreadable(error: &toml::de::Error, text: &str, at: usize) -> String {
    let begin = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[begin..].lines().next().unwrap_or_default();
    let key = line.split_once('=').map(|(key, _)| key.trim());
    let message = error.message();
    match key.filter(|key| !message.contains(&format!("`{key}`"))) {
        Some(key) => format!("`{key}`: {message}"),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../../scripts/cluster.toml");

    fn parse(text: &str) -> Result<Topology, String> {
        Topology::parse(Path::new("c.toml"), text).map_err(|e| e.to_string())
    }

    #[test]
    fn the_example_is_read() {
        let topology = parse(EXAMPLE).unwrap();
        let names: Vec<_> = topology.nodes.iter().map(|node| &*node.name).collect();
        assert_eq!(names, ["here", "there"]);
        assert_eq!(topology.nodes[0].ssh, None);
        let ssh = topology.nodes[1].ssh.clone().unwrap();
        assert_eq!((ssh.host.as_str(), ssh.port), ("10.77.0.2", Some(22)));
        assert_eq!(topology.model.ranks.len(), 4);
        assert!(!topology.is_one_host());
        let hosts: Vec<_> = topology
            .hosts()
            .iter()
            .map(|(node, ranks)| (node.name.clone(), *ranks))
            .collect();
        assert_eq!(hosts, [("here".to_owned(), 2), ("there".to_owned(), 2)]);
    }

    #[test]
    fn devices_of_a_node_stay_together() {
        let text = "coordinator.address = \"10.0.0.1\"\n\
            [[node]]\nname = \"a\"\naddress = \"10.0.0.1\"\ngpus = \"0-3\"\n\
            [[node]]\nname = \"b\"\naddress = \"10.0.0.2\"\ngpus = \"4,5\"\n\
            [[model]]\ndevices = [\"b:5\", \"a:1-2\", \"b:4\"]\n";
        let topology = parse(text).unwrap();
        let gpu = |index| Device::Gpu { index, ranks: 1 };
        let ranks = vec![(1, gpu(5)), (1, gpu(4)), (0, gpu(1)), (0, gpu(2))];
        assert_eq!(topology.model.ranks, ranks);
        let alone = text.replace("\"a:1-2\", ", "");
        assert!(parse(&alone).unwrap().is_one_host());
    }

    /// A line of the example in another way, and what is then said of which line.
    #[test]
    fn mistakes_are_named_with_file_line_and_key() {
        let base = "[coordinator]\naddress = \"10.0.0.1\"\n\
            [[node]]\nname = \"a\"\naddress = \"10.0.0.2\"\ncpus = 2\n\
            ssh = { user = \"me\" }\n\
            [[model]]\ndevices = [\"a\"]\n";
        parse(base).unwrap();
        for (from, to, line, said) in [
            ("cpus = 2", "cups = 2", 6, "`cups`"),
            ("cpus = 2", "cpus = 0", 6, "`cpus`: at least one"),
            ("cpus = 2", "cpus = \"4-1\"", 6, "smaller number first"),
            ("cpus = 2", "cpus = true", 6, "`cpus`: give a number"),
            ("cpus = 2", "cpus = 2\nshards = 0", 7, "`shards`: 0"),
            ("cpus = 2", "cpus = \"0,1\"\nshards = 3", 7, "`shards`: 3"),
            ("cpus = 2", "cpus = 2\ngpus = \"0\"", 7, "`gpus`: a node"),
            ("cpus = 2", "", 4, "`cpus`: say which"),
            (
                "cpus = 2",
                "cpus = 2\nwork_dir = \"x\"",
                7,
                "`work_dir`: give an absolute",
            ),
            (
                "cpus = 2",
                "cpus = 2\ninterface = \"a b\"",
                7,
                "`interface`",
            ),
            ("name = \"a\"", "name = \"a b\"", 4, "`name`: use letters"),
            ("name = \"a\"", "", 3, "`name`"),
            ("\"10.0.0.2\"", "\"ten\"", 5, "`address`"),
            ("\"10.0.0.2\"", "\"0.0.0.0\"", 5, "`address`: give the one"),
            ("\"10.0.0.1\"", "\"::\"", 2, "`address`: give the one"),
            ("user = \"me\"", "usr = \"me\"", 7, "`usr`"),
            ("user = \"me\"", "host = \" \"", 7, "`host`"),
            ("user = \"me\"", "port = 70000", 7, "70000"),
            ("[\"a\"]", "[\"b\"]", 9, "no node b; there are: a"),
            ("[\"a\"]", "[\"a:7\"]", 9, "no device 7; it has 0"),
            ("[\"a\"]", "[\"a:x\"]", 9, "`devices`: `x`"),
            ("[\"a\"]", "[\"a\", \"a:0\"]", 9, "named twice"),
            ("[\"a\"]", "[]", 9, "at least one node"),
            (
                "[\"a\"]",
                "[\"a\"]\npath = \"m\"",
                10,
                "`path`: give an absolute",
            ),
            (
                "[\"a\"]",
                "[\"a\"]\n[[model]]\ndevices = []",
                10,
                "keep one [[model]]",
            ),
            ("[\"a\"]", "[\"a\"", 9, ""),
        ] {
            let refused = parse(&base.replacen(from, to, 1)).unwrap_err();
            assert!(
                refused.starts_with(&format!("c.toml:{line}: ")),
                "{to}: {refused}"
            );
            assert!(refused.contains(said), "{to}: {refused}");
        }
    }

    #[test]
    fn names_are_unique_and_there_is_a_node() {
        let base = "[coordinator]\naddress = \"10.0.0.1\"\n\
            [[node]]\nname = \"a\"\naddress = \"10.0.0.2\"\ncpus = 2\n\
            [[model]]\ndevices = [\"a\"]\n";
        let twice = base.replace(
            "[[model]]",
            "[[node]]\nname = \"a\"\naddress = \"10.0.0.3\"\ncpus = 1\n[[model]]",
        );
        let refused = parse(&twice).unwrap_err();
        assert_eq!(refused, "c.toml:8: `name`: there are two nodes named a");
        assert!(
            parse("coordinator.address = \"10.0.0.1\"")
                .unwrap_err()
                .contains("`node`")
        );
    }
}
