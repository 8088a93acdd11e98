//! How a cluster that is being started makes itself known on its machine.
//!
//! From flags to an entry in the run directory; what is said there later is the board's business.

use super::args::Up;
use super::find;
use super::prepare::Prepared;
use crate::admin::entry::{Claim, Entry, RankEntry, State};
use crate::clock::unix_seconds;
use anyhow::{Context, Result};
use std::fs;
use std::net::SocketAddr;
use topology::ids::Rank;
use tracing_subscriber::filter::LevelFilter;

/// Takes an entry, named after `--name` or the port.
///
/// # Errors
/// A sentence that says who holds it.
pub(super) fn claim(up: &Up, prepared: &Prepared, address: SocketAddr) -> Result<Claim> {
    let places = find::places(up.run_dir.as_deref());
    let place = places.first().context("there is no run directory")?;
    let topology = up.topology.as_ref().map(|file| {
        // It was just read; another name for it will do as well.
        fs::canonicalize(file).unwrap_or_else(|_| file.clone())
    });
    let name = up.name.clone();
    let state = State {
        name: name.unwrap_or_else(|| address.port().to_string()),
        pid: std::process::id(),
        address,
        models: prepared
            .models
            .iter()
            .map(|it| it.model.name().to_owned())
            .collect(),
        topology,
        version: super::long_version().to_owned(),
        started: unix_seconds(),
        shutdown_seconds: up.shutdown_timeout,
        ranks: ranks(prepared),
        ended: None,
    };
    Claim::take(place, state)
}

/// The shards of all models, one model after the other, each in rank order.
fn ranks(prepared: &Prepared) -> Vec<RankEntry> {
    let topology = prepared.topology.as_ref();
    let host = |model: usize, rank: usize| {
        let named = topology.and_then(|topology| {
            let (node, _) = topology.models.get(model)?.ranks.get(rank)?;
            Some(topology.nodes[*node].name.clone())
        });
        named.unwrap_or_else(|| "localhost".to_owned())
    };
    let models = prepared.models.iter().enumerate();
    let ranks = models.flat_map(|(model, prepared)| {
        let ranks = prepared.placement.ranks();
        ranks.map(move |(rank, _)| (model, rank))
    });
    let entry = |(model, rank): (usize, Rank)| RankEntry {
        model,
        rank: rank.0,
        host: host(model, rank.index()),
        ..RankEntry::default()
    };
    ranks.map(entry).collect()
}

/// The cluster of this user that serves on `port`, if it is one.
pub(super) fn holder(up: &Up, port: u16) -> Option<String> {
    let entries = Entry::all(&find::places(up.run_dir.as_deref()));
    let mut live = entries.into_iter().filter(|entry| entry.is_live);
    let holder = live.find(|entry| entry.state.address.port() == port)?;
    Some(holder.state.to_string())
}

/// Which lines shards write. They are kept on file, so that there is more of them than this process
/// shows: it filters again.
pub(super) fn shard_log_level(level: &str) -> String {
    match level.parse::<LevelFilter>() {
        Ok(at_least) if at_least >= LevelFilter::INFO => level.to_owned(),
        Ok(_) => "info".to_owned(),
        Err(_) => format!("info,{level}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_say_no_less_than_what_is_kept() {
        for (given, passed) in [
            ("warn", "info"),
            ("off", "info"),
            ("info", "info"),
            ("debug", "debug"),
            ("coordinator=debug", "info,coordinator=debug"),
        ] {
            assert_eq!(shard_log_level(given), passed);
        }
    }
}
