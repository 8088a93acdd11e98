//! `cluster down`: asks a cluster to end, waits for it, and says what became of it.
//!
//! Waits for the process, not for its word: a cluster is down when nobody holds its entry any more. Where the
//! process was killed, what is left to end is shards that wait for another one.

use super::args::Down;
use super::{EXIT_FAULT, EXIT_INPUT, complain, find, say};
use crate::admin::client::ask;
use crate::admin::entry::{self, Entry};
use crate::clock::{now, since};
use anyhow::{Result, bail, ensure};
use hyper::Method;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// What the end takes besides running requests: answers that reach their clients, shards that stop or are
/// killed.
const END_LIMIT: Duration = Duration::from_secs(15);

/// Pause between looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Runs the command.
pub(super) fn run(flags: &Down) -> ExitCode {
    let entry = match find::live(&flags.which) {
        Ok(entry) => entry,
        Err(error) => return complain(&error, EXIT_INPUT),
    };
    let ended = if entry.is_live {
        end(entry, flags.now)
    } else {
        end_orphans(&entry)
    };
    match ended {
        Ok(text) => say(&text),
        Err(error) => complain(&error, EXIT_FAULT),
    }
}

fn end_orphans(entry: &Entry) -> Result<String> {
    if entry.state.topology.is_some() {
        let hosts: BTreeSet<&str> = entry.state.ranks.iter().map(|rank| &*rank.host).collect();
        let hosts = Vec::from_iter(hosts).join(", ");
        // A node that does not answer takes its time.
        tell(&format!("ending shards on {hosts}"));
    }
    let ended = entry::end_orphans(&entry.dir, |_| false)?;
    let (name, pid, count) = (&entry.state.name, entry.state.pid, ended.count);
    let said = format!(
        "cluster {name}: its process {pid} was gone; {count} shards that waited for another one are ended"
    );
    ensure!(
        ended.unreached.is_empty(),
        "{said}, others are not: {}",
        ended.unreached.join("; ")
    );
    Ok(said + "\n")
}

/// For whoever watches; a closed standard error must not stop it.
fn tell(what: &str) {
    let _ = writeln!(io::stderr(), "{what}");
}

fn end(mut entry: Entry, at_once: bool) -> Result<String> {
    let begun = now();
    let path = if at_once { "/now" } else { "/drain" };
    let pid = entry.state.pid;
    let answer: Result<Value> = ask(&entry.socket(), Method::POST, path);
    match answer {
        Ok(answer) if !at_once => {
            let unfinished = answer["unfinished"].as_u64().unwrap_or_default();
            let limit = entry.state.shutdown_seconds;
            if unfinished > 0 {
                tell(&format!(
                    "waiting up to {limit} s for {unfinished} requests; `cluster down --now` does not wait"
                ));
            }
        }
        Ok(_) => {}
        // It may have ended by itself just now.
        Err(error) => {
            entry.refresh();
            if entry.is_live {
                bail!(
                    "process {pid} does not answer: {error:#}; `kill -9 {pid}` ends it, and its shards after \
                     --shard-grace-period"
                );
            }
        }
    }
    let drain = Duration::from_secs(entry.state.shutdown_seconds.into());
    let limit = if at_once {
        END_LIMIT
    } else {
        drain + END_LIMIT
    };
    loop {
        entry.refresh();
        if !entry.is_live {
            break;
        }
        if since(begun) > limit {
            bail!(
                "process {pid} was asked to end and has not within {} s; `cluster down --now`, or \
                 `kill -9 {pid}`, ends it",
                limit.as_secs()
            );
        }
        thread::sleep(LOOK_EVERY);
    }
    let how = entry.state.ended.as_deref();
    let how = how.unwrap_or("it ended without a word");
    let took = since(begun).as_secs_f64();
    Ok(format!(
        "cluster {}: {how} ({took:.1} s)\n",
        entry.state.name
    ))
}
