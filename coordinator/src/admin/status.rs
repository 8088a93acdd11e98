//! What a cluster says of itself, as it crosses the admin socket and as `cluster status` shows it.
//!
//! Values and text; asks nobody. Invariant: `state` is `ready` only where a request would be served now.

use serde::{Deserialize, Serialize};
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use topology::fit::Bytes;

/// Where a cluster, a model or a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stand {
    /// Shards are started or load.
    Starting,
    /// Serving.
    Ready,
    /// A rank is being replaced; requests wait.
    Recovering,
    /// Finishing what runs, taking nothing new.
    Draining,
    /// It cannot go on, and ends.
    Failed,
    /// The process lives and says nothing.
    Silent,
    /// The process is gone, and its shards wait for another one.
    Orphaned,
}

impl fmt::Display for Stand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Recovering => "recovering",
            Self::Draining => "draining",
            Self::Failed => "failed",
            Self::Silent => "silent",
            Self::Orphaned => "orphaned",
        })
    }
}

/// A cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// As it was named, or its port.
    pub name: String,
    /// The coordinator's process.
    pub pid: u32,
    /// Where its API is.
    pub address: SocketAddr,
    /// Its topology file, if there is one.
    pub topology: Option<PathBuf>,
    /// The program's version.
    pub version: String,
    /// Where it stands.
    pub state: Stand,
    /// Why, where that needs saying.
    pub reason: Option<String>,
    /// Since it was started.
    pub uptime_seconds: f64,
    /// Its models, at least one.
    pub models: Vec<ModelStatus>,
    /// Shards of all models.
    pub ranks: Vec<RankStatus>,
}

/// A model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// What the API calls it.
    pub name: String,
    /// Where it stands.
    pub state: Stand,
    /// Why, where that needs saying.
    pub reason: Option<String>,
    /// The communicator's life.
    pub epoch: u64,
    /// Faults that were survived.
    pub recoveries: u64,
    /// Requests and their memory.
    pub queue: Queue,
}

/// A rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Its number among the shards of all models, by which `cluster logs` knows it.
    pub shard: u32,
    /// Its model.
    pub model: String,
    /// Its rank there.
    pub rank: u32,
    /// Its node.
    pub host: String,
    /// Its process there, while it has one.
    pub pid: Option<u32>,
    /// On what it computes, once it has said so.
    pub device: String,
    /// Where it stands.
    pub state: Stand,
    /// How its process ended, where it has none.
    pub reason: Option<String>,
    /// Processes it has had before this one.
    pub replacements: u32,
    /// Bytes of weights, workspace and KV blocks.
    pub used_bytes: u64,
    /// Bytes of its device that were free after loading.
    pub free_bytes: u64,
    /// Its last step.
    pub last_step_seconds: Option<f64>,
    /// File of what it prints.
    pub log: PathBuf,
}

/// Requests and their memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    /// Requests that run.
    pub running: u64,
    /// Requests that wait.
    pub waiting: u64,
    /// Tokens of key-value memory that running requests hold.
    pub kv_tokens_used: u64,
    /// Tokens of key-value memory in all.
    pub kv_tokens_total: u64,
}

impl Queue {
    /// Part of the key-value memory that is held, from 0 to 1.
    pub fn kv_use(&self) -> f64 {
        self.kv_tokens_used as f64 / self.kv_tokens_total.max(1) as f64
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, state, .. } = self;
        write!(f, "cluster {name}: {state}")?;
        if let Some(reason) = &self.reason {
            write!(f, " ({reason})")?;
        }
        let uptime = readable(Duration::try_from_secs_f64(self.uptime_seconds).unwrap_or_default());
        let names: Vec<_> = self.models.iter().map(|model| &*model.name).collect();
        writeln!(
            f,
            "\n  {} at http://{}/v1, process {}, up {uptime}",
            names.join(", "),
            self.address,
            self.pid,
        )?;
        let is_one = self.models.len() == 1;
        for model in &self.models {
            if !is_one {
                write!(f, "  {}: {}, ", model.name, model.state)?;
            }
            writeln!(f, "{}{model}", if is_one { "  " } else { "" })?;
        }
        let head = [
            "rank", "host", "process", "state", "step", "memory", "free", "device",
        ];
        let head = head.map(str::to_owned);
        let rows = self.ranks.iter().map(RankStatus::row);
        if is_one {
            let rows: Vec<_> = [head].into_iter().chain(rows).collect();
            write!(f, "\n{}", table(&rows))?;
        } else {
            // `cluster logs` counts the shards of all models.
            let of_model =
                |it: &RankStatus| wider([it.shard.to_string(), it.model.clone()], it.row());
            let head = wider(["shard", "model"].map(str::to_owned), head);
            let rows = [head].into_iter().chain(self.ranks.iter().map(of_model));
            write!(f, "\n{}", table(&rows.collect::<Vec<_>>()))?;
        }
        for rank in &self.ranks {
            if let Some(reason) = &rank.reason {
                let model = if is_one {
                    String::new()
                } else {
                    format!("{} ", rank.model)
                };
                writeln!(f, "  {model}rank {}: {reason}", rank.rank)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ModelStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Queue {
            running, waiting, ..
        } = self.queue;
        write!(
            f,
            "epoch {}, {} recoveries, {running} running, {waiting} waiting, {:.1}% of {} KV tokens in use",
            self.epoch,
            self.recoveries,
            self.queue.kv_use() * 100.0,
            self.queue.kv_tokens_total
        )
    }
}

impl RankStatus {
    fn row(&self) -> [String; 8] {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let bytes = |count: u64| or_dash((count > 0).then(|| Bytes(count).to_string()));
        let step = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
        [
            self.rank.to_string(),
            self.host.clone(),
            or_dash(self.pid.map(|pid| pid.to_string())),
            self.state.to_string(),
            or_dash(self.last_step_seconds.map(step)),
            bytes(self.used_bytes),
            bytes(self.free_bytes),
            self.device.clone(),
        ]
    }
}

/// A row with two columns more, at its beginning.
fn wider([shard, model]: [String; 2], rest: [String; 8]) -> [String; 10] {
    let [a, b, c, d, e, f, g, h] = rest;
    [shard, model, a, b, c, d, e, f, g, h]
}

/// Columns as wide as their widest cell; the last one is as long as it is.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let _ = write!(line, "  {cell:<width$}"); // strings do not fail
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `3d 04:05:06`, `04:05:06`, `5.1 s`.
fn readable(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let clock = format!("{hours:02}:{:02}:{:02}", seconds / 60 % 60, seconds % 60);
    match (days, seconds) {
        (0, ..60) => format!("{:.1} s", time.as_secs_f64()),
        (0, _) => clock,
        (days, _) => format!("{days}d {clock}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [["a", "bb", "c"], ["aaa", "b", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "  a    bb  c\n  aaa  b\n");
    }

    #[test]
    fn times_are_short() {
        for (seconds, text) in [
            (5, "5.0 s"),
            (65, "00:01:05"),
            (3 * 86_400 + 7, "3d 00:00:07"),
        ] {
            assert_eq!(readable(Duration::from_secs(seconds)), text);
        }
    }
}
