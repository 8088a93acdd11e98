//! What a node can be asked before anything is loaded on it, and what it answers.
//!
//! `cluster shard --examine` reads a [`Question`] per line of its standard input and writes an [`Answer`] per
//! line of its standard output; `cluster doctor` asks on every node, through `ssh` where needed, and judges.
//! Values, and the parts of the answers that need no device: [`host`], [`model`]. Invariant: nothing here
//! changes anything on the node.

pub mod host;
pub mod model;

use host::HostReport;
use model::ModelDigest;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// A line to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// What time it is.
    Clock,
    /// What the host is, and whether `address` is its own.
    Host {
        /// The node's address for other nodes.
        address: IpAddr,
    },
    /// What the files of a model are.
    Model {
        /// Its directory.
        directory: String,
        /// Whether weights are to be read whole.
        deep: bool,
    },
    /// Whether datagrams reach the coordinator and come back. It answers with those it gets.
    Reach {
        /// Where it listens.
        coordinator: SocketAddr,
        /// What to send, so that nobody else's datagram counts.
        nonce: u64,
    },
    /// To make the identity of a group of so many nodes, listening on its `interface`.
    MakeGroup {
        /// Nodes of the group.
        world_size: u32,
        /// This node's address for the others.
        interface: IpAddr,
    },
    /// To join a group and measure its all-reduce; all nodes are asked at the same time.
    AllReduce {
        /// What the first node answered to [`Question::MakeGroup`]; a secret of this group.
        id: Vec<u8>,
        /// This node's place.
        rank: u32,
        /// Nodes of the group.
        world_size: u32,
        /// This node's address for the others.
        interface: IpAddr,
    },
}

/// A line from a node, in the order of the questions; [`Answer::Reading`] may come any number of times before
/// another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// Microseconds since 1970.
    Clock(u64),
    /// The host.
    Host(Box<HostReport>),
    /// It is reading large files, and goes on.
    Reading {
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The files, or the sentence that says what is missing.
    Model(Result<ModelDigest, String>),
    /// Seconds there and back of the fastest datagram, or why there is none.
    Reach(Result<f64, String>),
    /// The identity.
    Group(Result<Vec<u8>, String>),
    /// How fast it was.
    AllReduce(Result<Speed, String>),
}

/// How fast an all-reduce is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Seconds of one of a few bytes; the median.
    pub latency_seconds: f64,
    /// Bytes of the tensor per second, of a large one; the best.
    pub bytes_per_second: f64,
}
