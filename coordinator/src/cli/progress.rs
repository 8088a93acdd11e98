//! What a person sees while shards start.
//!
//! Bars on a terminal, a few plain lines elsewhere, log events where standard error is read by a
//! program. Says nothing that the final report or an error does not say again.

use super::args::LogFormat;
use crate::clock::{now, since};
use crate::fleet::StartEvent;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long something may take before it is said how far it has come.
const PATIENCE: Duration = Duration::from_secs(1);

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

/// Shows how far something has come that reads large files; nothing where it is done in a moment.
#[derive(Debug)]
pub(super) struct Meter {
    notes: Notes,
    what: String,
    begun: Instant,
    /// What is shown already: a bar on a terminal, elsewhere the last tenth that a line was written for.
    shown: Mutex<(Option<ProgressBar>, u64)>,
}

impl Meter {
    /// `what` is done, in a few words.
    pub(super) fn new(notes: Notes, what: String) -> Self {
        Self {
            notes,
            what,
            begun: now(),
            shown: Mutex::new((None, 0)),
        }
    }

    /// So many bytes of so many.
    pub(super) fn tell(&self, done: u64, total: u64) {
        if since(self.begun) < PATIENCE {
            return;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let (bar, last) = &mut *shown;
        if io::stderr().is_terminal() && self.notes.0 == LogFormat::Text {
            let style = "{wide_msg} [{bar:24}] {bytes}/{total_bytes}";
            let bar = bar.get_or_insert_with(|| {
                let style = ProgressStyle::with_template(style);
                let style = style.expect("the template is a constant");
                let bar = ProgressBar::new(total).with_style(style.progress_chars("=> "));
                bar.with_message(self.what.clone())
            });
            bar.set_position(done);
            return;
        }
        let tenth = (done * 10).checked_div(total).unwrap_or(10);
        if tenth > *last {
            *last = tenth;
            let (what, percent) = (&self.what, tenth * 10);
            self.notes.say(&format!("{what}: {percent}%"));
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = &shown.0 {
            bar.finish_and_clear();
        }
    }
}

/// Shows the start of one cluster on standard error.
#[derive(Debug)]
pub(super) struct Progress {
    bars: MultiProgress,
    /// By model and rank. Models start at the same time.
    ranks: Vec<Vec<Mutex<RankLine>>>,
    notes: Notes,
    terminal: bool,
}

#[derive(Debug)]
struct RankLine {
    bar: ProgressBar,
    /// `rank 0`, or with its model's name before it where there are several.
    name: String,
    device: String,
    /// Last tenth that a plain line was written for.
    tenth: u64,
}

impl Progress {
    /// For models with their numbers of ranks.
    pub(super) fn new(models: &[(&str, u32)], notes: Notes) -> Self {
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template("{prefix:>9} {wide_msg} [{bar:24}] {percent:>3}%")
            .expect("the template is a constant")
            .progress_chars("=> ");
        let terminal = io::stderr().is_terminal() && notes.0 == LogFormat::Text;
        let line = |model: &str, rank: u32| {
            let name = match models {
                [_] => format!("rank {rank}"),
                _ => format!("{model} rank {rank}"),
            };
            let bar = ProgressBar::new(100).with_style(style.clone());
            let bar = bar.with_prefix(name.clone());
            Mutex::new(RankLine {
                // Off a terminal a bar would draw nothing but still cost a redraw timer.
                bar: if terminal {
                    bars.add(bar)
                } else {
                    ProgressBar::hidden()
                },
                name,
                device: String::new(),
                tenth: 0,
            })
        };
        let ranks = models
            .iter()
            .map(|(model, ranks)| (0..*ranks).map(|rank| line(model, rank)).collect());
        Self {
            ranks: ranks.collect(),
            bars,
            notes,
            terminal,
        }
    }

    /// Takes in what the fleet of model number `model` says.
    pub(super) fn show(&self, model: usize, event: &StartEvent) {
        let (StartEvent::Launched { rank, .. }
        | StartEvent::Adopted { rank, .. }
        | StartEvent::Admitted { rank, .. }
        | StartEvent::Loading { rank, .. }
        | StartEvent::Loaded { rank }) = event;
        let line = self.ranks.get(model).and_then(|it| it.get(rank.index()));
        let Some(line) = line else {
            return;
        };
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            StartEvent::Launched { pid, .. } => self.say(&line, &format!("process {pid}")),
            StartEvent::Adopted { pid, .. } => {
                let how = format!("process {pid} is taken over with its weights");
                self.say(&line, &how);
            }
            StartEvent::Admitted { device, .. } => {
                line.device.clone_from(device);
                self.say(&line, &format!("on {device}"));
            }
            StartEvent::Loading { done, total, .. } => self.loading(&mut line, *done, *total),
            StartEvent::Loaded { .. } => {
                line.bar.set_length(1);
                line.bar.set_position(1);
                self.say(&line, "weights are in place");
            }
        }
    }

    /// Removes the bars, so that what follows stands alone.
    pub(super) fn finish(self) {
        // Nothing depends on the terminal still being there.
        let _ = self.bars.clear();
    }

    fn loading(&self, line: &mut RankLine, done: u64, total: u64) {
        line.bar.set_length(total.max(1));
        line.bar.set_position(done);
        let tenth = (done * 10).checked_div(total).unwrap_or(10);
        let next = tenth > line.tenth && tenth < 10;
        line.tenth = tenth;
        if self.terminal {
            line.bar.set_message(format!("loading on {}", line.device));
        } else if next {
            let (name, percent) = (&line.name, tenth * 10);
            self.notes
                .say(&format!("{name}: {percent}% of the weights are loaded"));
        }
    }

    fn say(&self, line: &RankLine, what: &str) {
        if self.terminal {
            line.bar.set_message(what.to_owned());
        } else {
            self.notes.say(&format!("{}: {what}", line.name));
        }
    }
}
