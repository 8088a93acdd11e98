//! `cluster status`: asks the process and shows what it says.
//!
//! A process that lives and does not answer is shown too, with what its entry says; so are shards that wait
//! for another process. Exit code 0 only where a request would be served now.

use super::args::Status as Flags;
use super::{EXIT_FAULT, EXIT_INPUT, complain, find, say};
use crate::admin::client::ask;
use crate::admin::entry::Entry;
use crate::admin::status::{ModelStatus, Queue, RankStatus, Stand, Status};
use crate::clock::unix_seconds;
use crate::fleet::Legacy;
use hyper::Method;
use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;
use topology::launch::notice;

/// Runs the command.
pub(super) fn run(flags: &Flags) -> ExitCode {
    let entry = match find::live(&flags.which) {
        Ok(entry) => entry,
        Err(error) => return complain(&error, EXIT_INPUT),
    };
    let status = if entry.is_live {
        let status = ask(&entry.socket(), Method::GET, "/status");
        status.unwrap_or_else(|error| silent(&entry, &format!("{error:#}")))
    } else {
        orphaned(&entry)
    };
    let text = if flags.json {
        // The type holds nothing that JSON cannot say.
        let json = serde_json::to_string_pretty(&status).expect("numbers and texts");
        json + "\n"
    } else {
        status.to_string()
    };
    let said = say(&text);
    if status.state == Stand::Ready {
        said
    } else {
        ExitCode::from(EXIT_FAULT)
    }
}

/// What can be said of a process that does not answer.
fn silent(entry: &Entry, why: &str) -> Status {
    let pid = entry.state.pid;
    let why = format!(
        "process {pid} does not answer: {why}; where that goes on, `kill -9 {pid}` ends it, and its shards \
         after --shard-grace-period"
    );
    from_entry(entry, Stand::Silent, why, |_| true)
}

/// What can be said of a cluster whose process was killed.
fn orphaned(entry: &Entry) -> Status {
    let waiting = waiting(entry);
    let all = entry.state.ranks.len();
    let left = waiting.values().flatten().min();
    let left = left.map_or_else(String::new, |seconds| {
        format!(" for {seconds} more seconds")
    });
    let legacies = Legacy::read(&entry.dir);
    let mut holders = legacies.values().flat_map(|legacy| legacy.ranks.iter());
    let elsewhere = if holders.any(|holder| holder.as_ref().is_some_and(|it| it.away.is_some())) {
        " (other nodes are not asked)"
    } else {
        ""
    };
    let why = format!(
        "its process {} is gone; {} of {all} shards hold their weights{left}{elsewhere}: `cluster up` with the same \
         settings takes them over, `cluster down` ends them",
        entry.state.pid,
        waiting.len()
    );
    from_entry(entry, Stand::Orphaned, why, |shard| {
        waiting.contains_key(&shard)
    })
}

/// The shards that wait, and for how many more seconds, where they have said so.
fn waiting(entry: &Entry) -> BTreeMap<u32, Option<u64>> {
    let left = |shard: u32| {
        let log = &entry.state.ranks.get(shard as usize)?.log;
        let until = fs::read_to_string(notice(log)).ok()?;
        Some(until.parse::<u64>().ok()?.saturating_sub(unix_seconds()))
    };
    let mut waiting = BTreeMap::new();
    for legacy in Legacy::read(&entry.dir).values() {
        let first = legacy.terms.first_shard;
        let shards = legacy.alive().map(|(rank, holder)| {
            let shard = first + rank.0;
            let left = match holder.away {
                None => left(shard),
                Some(_) => Some(legacy.seconds_left()),
            };
            (shard, left)
        });
        waiting.extend(shards);
    }
    waiting
}

fn from_entry(entry: &Entry, stand: Stand, why: String, lives: impl Fn(u32) -> bool) -> Status {
    let state = entry.state.clone();
    let names = state.models.clone();
    let rank = |(shard, entry): (u32, crate::admin::entry::RankEntry)| RankStatus {
        shard,
        model: names.get(entry.model).cloned().unwrap_or_default(),
        rank: entry.rank,
        host: entry.host,
        pid: entry.pid.filter(|_| lives(shard)),
        device: String::new(),
        state: stand,
        reason: None,
        replacements: 0,
        used_bytes: 0,
        free_bytes: 0,
        last_step_seconds: None,
        log: entry.log,
    };
    let model = |name| ModelStatus {
        name,
        state: stand,
        reason: None,
        epoch: 0,
        recoveries: 0,
        queue: Queue::default(),
    };
    Status {
        reason: Some(why),
        name: state.name,
        pid: state.pid,
        address: state.address,
        topology: state.topology,
        version: state.version,
        state: stand,
        uptime_seconds: unix_seconds().saturating_sub(state.started) as f64,
        ranks: (0..).zip(state.ranks).map(rank).collect(),
        models: state.models.into_iter().map(model).collect(),
    }
}
