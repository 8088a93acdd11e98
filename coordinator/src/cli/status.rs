//! `cluster status`: asks the process and shows what it says.
//!
//! A process that lives and does not answer is shown too, with what its entry says. Exit code 0 only
//! where a request would be served now.

use super::args::Status as Flags;
use super::{EXIT_FAULT, EXIT_INPUT, complain, find, say};
use crate::admin::client::ask;
use crate::admin::entry::Entry;
use crate::admin::status::{ModelStatus, Queue, RankStatus, Stand, Status};
use crate::clock::unix_seconds;
use hyper::Method;
use std::process::ExitCode;

/// Runs the command.
pub(super) fn run(flags: &Flags) -> ExitCode {
    let entry = match find::live(&flags.which) {
        Ok(entry) => entry,
        Err(error) => return complain(&error, EXIT_INPUT),
    };
    let status = ask(&entry.socket(), Method::GET, "/status");
    let status = status.unwrap_or_else(|error| silent(&entry, &format!("{error:#}")));
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
    let state = entry.state.clone();
    let names = state.models.clone();
    let rank = |(shard, entry): (u32, crate::admin::entry::RankEntry)| RankStatus {
        shard,
        model: names.get(entry.model).cloned().unwrap_or_default(),
        rank: entry.rank,
        host: entry.host,
        pid: entry.pid,
        device: String::new(),
        state: Stand::Silent,
        reason: None,
        replacements: 0,
        used_bytes: 0,
        free_bytes: 0,
        last_step_seconds: None,
        log: entry.log,
    };
    let model = |name| ModelStatus {
        name,
        state: Stand::Silent,
        reason: None,
        epoch: 0,
        recoveries: 0,
        queue: Queue::default(),
    };
    Status {
        reason: Some(format!(
            "process {} does not answer: {why}; where that goes on, `kill -9 {}` ends it and its shards",
            state.pid, state.pid
        )),
        name: state.name,
        pid: state.pid,
        address: state.address,
        topology: state.topology,
        version: state.version,
        state: Stand::Silent,
        uptime_seconds: unix_seconds().saturating_sub(state.started) as f64,
        ranks: (0..).zip(state.ranks).map(rank).collect(),
        models: state.models.into_iter().map(model).collect(),
    }
}
