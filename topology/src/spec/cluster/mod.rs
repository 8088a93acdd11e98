//! `cluster.toml`: which nodes there are, how they are reached, and which devices a model takes.
//!
//! Text to values: nothing is looked up or connected to. Whoever reads the error is the one who wrote the
//! file, so it names file, line and key. Invariants: names of nodes are unique; a model's ranks
//! are devices that their nodes have, none twice and none another model's, of one kind, those of a node side
//! by side.

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
    /// The models and their ranks, at least one.
    pub models: Vec<ModelSpec>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Unique.
    pub name: String,
    /// Where other nodes reach it.
    pub address: IpAddr,
    /// The network interface that NCCL takes; there is one wherever ranks on GPUs reach over nodes.
    pub interface: Option<String>,
    /// How to get there; `None` is the coordinator's own machine.
    pub ssh: Option<Target>,
    /// Where the program is put there.
    pub work_dir: String,
    /// One rank may be on each.
    pub devices: Vec<Device>,
}

/// A model, and on what it is computed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelSpec {
    /// What the API calls it; the first is shown. Empty: as its directory.
    pub names: Vec<String>,
    /// Its directory, the same on all machines; `None` is the built-in model.
    pub path: Option<String>,
    /// In rank order: index of the node, and the device.
    pub ranks: Vec<(usize, Device)>,
    /// What differs from the command line, which is for all models.
    pub settings: Vec<Setting>,
}

/// A flag of the command line for one model alone. What values it takes is the command line's to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The flag without its dashes, words joined by `_`.
    pub key: &'static str,
    /// As it would be typed.
    pub value: String,
    /// Where it stands, from 1.
    pub line: usize,
}

impl ModelSpec {
    /// Whether all ranks are on one machine.
    pub fn is_one_host(&self) -> bool {
        self.hosts().len() <= 1
    }

    /// The indices of the nodes that have ranks, with how many, in rank order.
    pub fn hosts(&self) -> Vec<(usize, usize)> {
        let ranks = self.ranks.chunk_by(|(one, _), (other, _)| one == other);
        ranks.map(|ranks| (ranks[0].0, ranks.len())).collect()
    }
}

impl Topology {
    /// Reads the text of `file`.
    ///
    /// # Errors
    /// [`TopologyError`] that names line and key.
    pub fn parse(file: &Path, text: &str) -> Result<Self, TopologyError> {
        let line = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
        let wrong = |at: usize, reason: String| TopologyError {
            file: file.to_owned(),
            line: line(at),
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
        raw.check(&line)
            .map_err(|Wrong { at, reason }| wrong(at, reason))
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
        let [model] = topology.models.as_slice() else {
            panic!("{:?}", topology.models);
        };
        assert_eq!((model.ranks.len(), model.is_one_host()), (4, false));
        assert_eq!(model.hosts(), [(0, 2), (1, 2)]);
    }

    #[test]
    fn devices_of_a_node_stay_together() {
        let text = "coordinator.address = \"10.0.0.1\"\n\
            [[node]]\nname = \"a\"\naddress = \"10.0.0.1\"\ninterface = \"ib0\"\ngpus = \"0-3\"\n\
            [[node]]\nname = \"b\"\naddress = \"10.0.0.2\"\ninterface = \"ib1\"\ngpus = \"4,5\"\n\
            [[model]]\ndevices = [\"b:5\", \"a:1-2\", \"b:4\"]\n";
        let topology = parse(text).unwrap();
        let gpu = |index| Device::Gpu { index, ranks: 1 };
        let ranks = vec![(1, gpu(5)), (1, gpu(4)), (0, gpu(1)), (0, gpu(2))];
        assert_eq!(topology.models[0].ranks, ranks);
        let alone = text.replace("\"a:1-2\", ", "");
        assert!(parse(&alone).unwrap().models[0].is_one_host());
        // Between nodes NCCL must not choose the network; on one node it needs none.
        for text in [
            text.to_owned(),
            text.split("[[model]]").next().unwrap().into(),
        ] {
            let refused = parse(&text.replace("interface = \"ib1\"\n", "")).unwrap_err();
            assert!(refused.contains("give node b an `interface`"), "{refused}");
        }
        assert!(parse(&alone.replace("interface = \"ib1\"\n", "")).is_ok());
        let mixed = text.replace("gpus = \"4,5\"", "cpus = 6\nshards = 6");
        let refused = parse(&mixed).unwrap_err();
        assert!(refused.contains("on GPUs or on cores"), "{refused}");
    }

    #[test]
    fn models_have_devices_names_and_flags_of_their_own() {
        let text = "coordinator.address = \"10.0.0.1\"\n\
            [[node]]\nname = \"a\"\naddress = \"10.0.0.1\"\ncpus = 4\nshards = 4\n\
            [[model]]\ndevices = [\"a:0-1\"]\nname = [\"x\", \"y\"]\nmax_model_len = \"32k\"\n\
            [[model]]\ndevices = [\"a:2-3\"]\npath = \"/m\"\nenforce_eager = true\n\
            gpu_memory_utilization = 0.5\nscheduling_policy = \"priority\"\n";
        let topology = parse(text).unwrap();
        let [one, other] = topology.models.as_slice() else {
            panic!("{:?}", topology.models);
        };
        assert_eq!((one.ranks.len(), other.ranks.len()), (2, 2));
        assert_eq!(one.names, ["x", "y"]);
        let setting = |key, value: &str, line| {
            let value = value.to_owned();
            Setting { key, value, line }
        };
        assert_eq!(one.settings, [setting("max_model_len", "32k", 10)]);
        let settings = [
            setting("gpu_memory_utilization", "0.5", 15),
            setting("scheduling_policy", "priority", 16),
            setting("enforce_eager", "true", 14),
        ];
        assert_eq!(other.settings, settings);
        let refused = parse(&text.replace("a:2-3", "a:1-3")).unwrap_err();
        let said = "c.toml:12: `devices`: device 1 of a is another model's";
        assert!(refused.starts_with(said), "{refused}");
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
                "[\"a\"]\n[[model]]\ndevices = [\"a\"]",
                11,
                "another model's",
            ),
            ("[\"a\"]", "[\"a\"]\nname = []", 10, "`name`: give a text"),
            ("[\"a\"]", "[\"a\"]\nname = [1]", 10, "`name`: give a text"),
            ("[\"a\"]", "[\"a\"]\ndtype = [1]", 10, "`dtype`: give"),
            ("[\"a\"]", "[\"a\"]\nport = 1", 10, "`port`"),
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
