//! Which cluster an operator's command is about.
//!
//! Looks into the run directory; talks to nobody. Invariant: a command never picks one of several by
//! itself.

use super::args::Which;
use crate::admin::entry::{self, Entry};
use crate::admin::status::table;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// Where this user's clusters are known, the place for new ones first.
pub(super) fn places(given: Option<&Path>) -> Vec<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    entry::places(given, runtime.as_deref())
}

/// The one cluster that runs, or whose shards wait for one that does, and is meant.
///
/// # Errors
/// A sentence: there is none, or they are several, with their names.
pub(super) fn live(which: &Which) -> Result<Entry> {
    one(which, is_there)
}

/// The one that runs and is meant, or else the last one that ended.
///
/// # Errors
/// As [`live`].
pub(super) fn live_or_last(which: &Which) -> Result<Entry> {
    let found = matching(which);
    let any_live = found.iter().any(is_there);
    match found.into_iter().next() {
        Some(last) if !any_live => Ok(last),
        _ => live(which),
    }
}

fn is_there(entry: &Entry) -> bool {
    entry.is_live || entry.orphans > 0
}

fn matching(which: &Which) -> Vec<Entry> {
    let mut entries = Entry::all(&places(which.run_dir.as_deref()));
    let named = |entry: &Entry| which.name.as_ref().is_none_or(|n| *n == entry.state.name);
    let at = |entry: &Entry| which.port.is_none_or(|p| p == entry.state.address.port());
    entries.retain(|entry| named(entry) && at(entry));
    entries
}

fn one(which: &Which, wanted: impl Fn(&Entry) -> bool) -> Result<Entry> {
    let mut found = matching(which);
    found.retain(wanted);
    match (found.len(), found.pop()) {
        (1, Some(entry)) => Ok(entry),
        (_, None) => {
            let asked = [
                which.name.as_ref().map(|name| format!(" named {name}")),
                which.port.map(|port| format!(" on port {port}")),
            ];
            let asked: String = asked.into_iter().flatten().collect();
            let looked = places(which.run_dir.as_deref());
            let looked: Vec<_> = looked.iter().map(|p| p.display().to_string()).collect();
            bail!(
                "no cluster{asked} of this user runs on this machine (looked in {}); start one with \
                 `cluster up`",
                looked.join(", ")
            )
        }
        (count, Some(last)) => {
            found.push(last);
            let row = |entry: &Entry| {
                let state = &entry.state;
                [
                    match state.name.parse::<u16>() {
                        Ok(_) => String::new(),
                        Err(_) => format!("--name {}", state.name),
                    },
                    format!("--port {}", state.address.port()),
                    state.models.join(", "),
                    if entry.is_live {
                        format!("process {}", state.pid)
                    } else {
                        "its shards wait for a process".to_owned()
                    },
                ]
            };
            let rows: Vec<_> = found.iter().map(row).collect();
            bail!("{count} clusters run; say which:\n{}", table(&rows))
        }
    }
}
