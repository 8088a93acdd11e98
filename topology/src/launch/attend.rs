//! Looks after a shard on its own node for a coordinator on another one, which did not start it.
//!
//! `cluster shard --attend` runs through `ssh`: says whether the shard lives, hands on what the shard writes to its log
//! file since it lost its parent, ends with it, and ends it when told to. When its own standard input just closes,
//! the coordinator is lost again: it goes, and the shard waits. A shard that takes another one's place there
//! (`cluster shard --after`) ends that first. Decides nothing.
//!
//! Invariants: no signal reaches another process than the one that is meant; once the shard has ended, its files are
//! gone.

use super::process::ProcessId;
use super::{handed_on, is_attended, log_position, read_farewell, remove_log, to_line};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Pause between looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest time until the system has ended a process that was killed, and the pause between looks for that.
const KILL_LIMIT: Duration = Duration::from_secs(5);
const LOOK_FOR_END_EVERY: Duration = Duration::from_millis(5);
/// Most bytes of a log that are handed on at once.
const MAX_PART_BYTES: u64 = 1 << 20;

/// Which shard; on the command line it is JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// Its process.
    pub process: ProcessId,
    /// Its log file.
    pub log: PathBuf,
}

impl FromStr for Charge {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

impl Charge {
    /// Ends the shard here, if it runs, for one that takes its place: its memory is free then.
    ///
    /// # Errors
    /// If the system does not end it in time.
    pub fn end(&self) -> io::Result<()> {
        self.process.kill();
        let mut waited = Duration::ZERO;
        while self.process.is_running() {
            if waited >= KILL_LIMIT {
                let pid = self.process.pid;
                let why = format!("process {pid}, whose place this one takes, does not end");
                return Err(io::Error::other(why));
            }
            thread::sleep(LOOK_FOR_END_EVERY);
            waited += LOOK_FOR_END_EVERY;
        }
        // Whoever attends it hands the rest of it on.
        if !is_attended(&self.log) {
            remove_log(&self.log);
        }
        Ok(())
    }
}

/// The first line of whoever attends a shard; the rest is the shard's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attended {
    /// Whether the shard's process runs.
    pub is_running: bool,
}

/// Looks after a shard until it ends, or until nobody asks any more. What the shard wrote goes to `out`; `stdin` is
/// read by a thread of its own.
///
/// # Errors
/// If nobody reads what it says.
pub fn attend(
    charge: &Charge,
    stdin: impl Read + Send + 'static,
    mut out: impl Write,
) -> io::Result<()> {
    let process = charge.process;
    let said = Attended {
        is_running: process.is_running(),
    };
    out.write_all(&to_line(&said).map_err(io::Error::other)?)?;
    out.flush()?;
    let (told, orders) = channel();
    thread::Builder::new()
        .name("parent".to_owned())
        .spawn(move || {
            // Nobody listens only at the end.
            let _ = told.send(read_farewell(stdin));
        })?;
    let mut log = Follower::new(charge);
    let mut is_told = false;
    loop {
        // Looked at before the log is: what was written until the end is handed on.
        let is_running = process.is_running();
        let forwarded = log.forward(&mut out);
        if !is_running {
            remove_log(&charge.log);
            return forwarded;
        }
        if is_told {
            // Whoever told it may be gone.
            thread::sleep(LOOK_EVERY);
            continue;
        }
        forwarded?;
        match orders.recv_timeout(LOOK_EVERY) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(true) => {
                is_told = true;
                process.kill();
            }
            Ok(false) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// A log file, read up to somewhere.
struct Follower {
    log: PathBuf,
    /// Where that is written down, for whoever attends the shard next.
    position: PathBuf,
    /// Says that somebody reads here. Where that is not possible, last lines may be lost.
    _lock: Option<File>,
    read: u64,
}

impl Follower {
    fn new(charge: &Charge) -> Self {
        let position = log_position(&charge.log);
        let mut options = OpenOptions::new();
        let lock = options
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&position);
        Self {
            // Shared with one whose way to its coordinator is broken, and who does not know yet.
            _lock: lock.ok().filter(|lock| lock.try_lock_shared().is_ok()),
            read: handed_on(&charge.log).unwrap_or(0),
            log: charge.log.clone(),
            position,
        }
    }

    /// Hands on whole lines; the rest when it has its end.
    fn forward(&mut self, out: &mut impl Write) -> io::Result<()> {
        while let Ok(part @ [_, ..]) = self.part().as_deref() {
            out.write_all(part)?;
            out.flush()?;
            self.read += part.len() as u64;
            // Without it some lines may be handed on twice.
            let _ = fs::write(&self.position, self.read.to_string());
        }
        Ok(())
    }

    fn part(&mut self) -> io::Result<Vec<u8>> {
        let mut part = Vec::new();
        let length = fs::metadata(&self.log)?.len();
        if length < self.read {
            // The shard began anew, as all of a long file was handed on.
            self.read = 0;
        }
        if length > self.read {
            let mut file = File::open(&self.log)?;
            file.seek(SeekFrom::Start(self.read))?;
            file.take(MAX_PART_BYTES).read_to_end(&mut part)?;
            let end = part.iter().rposition(|byte| *byte == b'\n');
            // A line as long as a part goes in pieces.
            if (part.len() as u64) < MAX_PART_BYTES || end.is_some() {
                part.truncate(end.map_or(0, |end| end + 1));
            }
        }
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::{Hold, log_of};
    use rustix::process::{Pid, Signal, kill_process};
    use std::process::{Child, Command, Stdio};
    use std::sync::{Arc, Mutex};

    /// What was said so far.
    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);

    impl Said {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn until(&self, end: &str) {
            for _ in 0..1000 {
                if self.text().ends_with(end) {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
            panic!("{end:?} is not the end of {:?}", self.text());
        }
    }

    impl Write for Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn sleep() -> Child {
        let sleep = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn();
        sleep.unwrap()
    }

    /// Attends it; what it says, the end of its standard input, and its own end.
    fn begin(charge: &Charge) -> (Said, io::PipeWriter, thread::JoinHandle<io::Result<()>>) {
        let (stdin, order) = io::pipe().unwrap();
        let said = Said::default();
        let (charge, out) = (charge.clone(), said.clone());
        let attendant = thread::spawn(move || attend(&charge, stdin, out));
        (said, order, attendant)
    }

    #[test]
    fn lines_are_handed_on_once_and_a_farewell_ends_the_shard_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("shard.log");
        let append = |text: &str| {
            let file = OpenOptions::new().create(true).append(true).open(&log);
            file.unwrap().write_all(text.as_bytes()).unwrap();
        };
        let mut shard = sleep();
        let process = ProcessId::of(shard.id()).unwrap();
        let charge = Charge {
            process,
            log: log.clone(),
        };
        let text = serde_json::to_string(&charge).unwrap();
        assert_eq!(text.parse::<Charge>().unwrap(), charge);

        let (said, order, attendant) = begin(&charge);
        said.until("{\"is_running\":true}\n");
        append("one\ntw");
        said.until("}\none\n");
        append("o\n");
        said.until("}\none\ntwo\n");
        // The coordinator is lost again, and the shard goes on.
        drop(order);
        attendant.join().unwrap().unwrap();
        assert!(process.is_running());
        append("three\n");
        assert_eq!(handed_on(&log), Some(8));

        let hold = Hold {
            seconds: 1,
            legacy: None,
            log: log.clone(),
        };
        assert!(hold.is_unattended());
        let (said, mut order, attendant) = begin(&charge);
        said.until("}\nthree\n");
        assert!(!hold.is_unattended(), "its files are not its own to remove");
        fs::write(&log, "four\n").unwrap();
        said.until("}\nthree\nfour\n");
        order.write_all(super::super::FAREWELL).unwrap();
        attendant.join().unwrap().unwrap();
        assert!(!process.is_running());
        shard.wait().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        // One that was killed while nobody looked is forgotten by the next one, and others are not.
        let own = ProcessId::own().unwrap();
        for process in [own, process] {
            let log = log_of(process, dir.path());
            fs::write(log_position(&log), "").unwrap();
            fs::write(log, "").unwrap();
        }
        let other = dir.path().join("other.log");
        fs::write(&other, "").unwrap();
        hold.forget_the_dead();
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|file| file.unwrap().path())
            .collect();
        left.sort();
        let log = log_of(own, dir.path());
        assert_eq!(left, [other, log.clone(), log_position(&log)]);

        // Nobody else is hit who has the number now.
        let (said, _order, attendant) = begin(&charge);
        attendant.join().unwrap().unwrap();
        assert_eq!(said.text(), "{\"is_running\":false}\n");
    }

    #[test]
    fn whoever_takes_a_shards_place_ends_it_and_loses_nothing_of_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("shard.log");
        for is_attended in [true, false] {
            fs::write(&log, "one\n").unwrap();
            let mut shard = sleep();
            let process = ProcessId::of(shard.id()).unwrap();
            let log = log.clone();
            let charge = Charge { process, log };
            let pid = i32::try_from(shard.id()).unwrap();
            kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
            let attended = is_attended.then(|| begin(&charge));
            if let Some((said, ..)) = &attended {
                said.until("{\"is_running\":true}\none\n");
            }
            charge.end().unwrap();
            assert!(!process.is_running());
            shard.wait().unwrap();
            if let Some((_, _order, attendant)) = attended {
                attendant.join().unwrap().unwrap();
            }
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            charge.end().unwrap();
        }
    }
}
