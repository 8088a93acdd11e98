//! What a person sees while shards start.
//!
//! Bars on a terminal, a few plain lines elsewhere, log events where standard error is read by a
//! program. Says nothing that the final report or an error does not say again.

use super::args::LogFormat;
use crate::fleet::StartEvent;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use topology::ids::Rank;

/// Lines for whoever watches. With `--log-format json` every line of standard error is JSON, so they
/// become events of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notes(pub LogFormat);

impl Notes {
    /// Something is going on.
    pub(super) fn say(self, text: &str) {
        match self.0 {
            // A closed standard error must not stop the cluster.
            LogFormat::Text => drop(writeln!(io::stderr(), "{text}")),
            LogFormat::Json => tracing::info!("{text}"),
        }
    }

    /// Something should be changed.
    pub(super) fn warn(self, text: &str) {
        match self.0 {
            LogFormat::Text => self.say(&format!("warning: {text}")),
            LogFormat::Json => tracing::warn!("{text}"),
        }
    }
}

/// Shows the start of one cluster on standard error.
#[derive(Debug)]
pub(super) struct Progress {
    bars: MultiProgress,
    ranks: Vec<RankLine>,
    notes: Notes,
    terminal: bool,
}

#[derive(Debug)]
struct RankLine {
    bar: ProgressBar,
    device: String,
    /// Last tenth that a plain line was written for.
    tenth: u64,
}

impl Progress {
    /// For `world_size` ranks.
    pub(super) fn new(world_size: u32, notes: Notes) -> Self {
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template("{prefix:>9} {wide_msg} [{bar:24}] {percent:>3}%")
            .expect("the template is a constant")
            .progress_chars("=> ");
        let terminal = io::stderr().is_terminal() && notes.0 == LogFormat::Text;
        let ranks = (0..world_size)
            .map(|rank| {
                let bar = ProgressBar::new(100).with_style(style.clone());
                let bar = bar.with_prefix(format!("rank {rank}"));
                RankLine {
                    // Off a terminal a bar would draw nothing but still cost a redraw timer.
                    bar: if terminal {
                        bars.add(bar)
                    } else {
                        ProgressBar::hidden()
                    },
                    device: String::new(),
                    tenth: 0,
                }
            })
            .collect();
        Self {
            bars,
            ranks,
            notes,
            terminal,
        }
    }

    /// Takes in what the fleet says.
    pub(super) fn show(&mut self, event: &StartEvent) {
        match event {
            StartEvent::Launched { rank, pid } => self.say(*rank, &format!("process {pid}")),
            StartEvent::Adopted { rank, pid } => {
                self.say(
                    *rank,
                    &format!("process {pid} is taken over with its weights"),
                );
            }
            StartEvent::Admitted { rank, device } => {
                if let Some(line) = self.ranks.get_mut(rank.index()) {
                    line.device.clone_from(device);
                }
                self.say(*rank, &format!("on {device}"));
            }
            StartEvent::Loading { rank, done, total } => self.loading(*rank, *done, *total),
            StartEvent::Loaded { rank } => {
                if let Some(line) = self.ranks.get(rank.index()) {
                    line.bar.set_length(1);
                    line.bar.set_position(1);
                }
                self.say(*rank, "weights are in place");
            }
        }
    }

    /// Removes the bars, so that what follows stands alone.
    pub(super) fn finish(self) {
        // Nothing depends on the terminal still being there.
        let _ = self.bars.clear();
    }

    fn loading(&mut self, rank: Rank, done: u64, total: u64) {
        let Some(line) = self.ranks.get_mut(rank.index()) else {
            return;
        };
        line.bar.set_length(total.max(1));
        line.bar.set_position(done);
        let tenth = (done * 10).checked_div(total).unwrap_or(10);
        let next = tenth > line.tenth && tenth < 10;
        line.tenth = tenth;
        if self.terminal {
            line.bar.set_message(format!("loading on {}", line.device));
        } else if next {
            let percent = tenth * 10;
            self.notes.say(&format!(
                "rank {rank}: {percent}% of the weights are loaded"
            ));
        }
    }

    fn say(&self, rank: Rank, what: &str) {
        if !self.terminal {
            self.notes.say(&format!("rank {rank}: {what}"));
        } else if let Some(line) = self.ranks.get(rank.index()) {
            line.bar.set_message(what.to_owned());
        }
    }
}
