//! The operator's side of a running cluster: where it is found, what it says of itself, how it is told to
//! end.
//!
//! [`entry`] is the run directory; [`board`] is what the process knows about itself; [`server`] and
//! [`client`] are the two ends of the socket in the run directory; [`shard_log`] keeps what shards print.
//! Nothing here is reachable over the network: who may call is who owns the directory.

pub mod board;
pub mod client;
pub mod entry;
pub mod server;
pub mod shard_log;
pub mod status;
