//! One `cluster up` process under test: started on a free port, watched, and never left behind.

use crate::sockets::nothing_else_listens;
use coordinator::clock;
use rustix::process::Signal;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

/// No single wait of these tests is longer; a loaded machine gets ten times what an idle one needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running cluster.
pub(crate) struct Cluster {
    child: Child,
    /// Where its API is.
    pub(crate) address: SocketAddr,
    /// Process ids of its shards, by rank.
    pub(crate) shards: Vec<u32>,
    stderr: Arc<Mutex<String>>,
}

/// The run directory of all clusters of these tests.
pub(crate) const RUN_DIR: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/run");

/// The binary, a third of its size where there is a `strip`: tests have it hashed, and copied to hosts, many times.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let whole = PathBuf::from(env!("CARGO_BIN_EXE_cluster"));
        let small = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster");
        let mut strip = Command::new("strip");
        let strip = strip.args(["--strip-debug", "-o"]).args([&small, &whole]);
        let is_small = strip
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|it| it.success());
        if is_small { small } else { whole }
    })
}

/// The binary with these arguments, its environment free of settings.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CLUSTER_") {
            command.env_remove(name);
        }
    }
    command.env("CLUSTER_RUN_DIR", RUN_DIR);
    command
}

/// Runs the binary to its end: exit code, standard output, standard error.
pub(crate) fn run(arguments: &[&str]) -> (i32, String, String) {
    finish(command(arguments))
}

/// The same of a command of it.
pub(crate) fn finish(mut command: Command) -> (i32, String, String) {
    let output = command.output().expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    let code = output.status.code().expect("no signal ended it");
    (code, text(output.stdout), text(output.stderr))
}

impl Cluster {
    /// Starts `cluster up --port 0` with further arguments and waits until it serves.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut up = command(&["up", "--port", "0"]);
        up.args(arguments);
        Self::launch(up)
    }

    /// The same of any `cluster up`.
    pub(crate) fn launch(mut up: Command) -> Self {
        let mut child = up
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let stderr = collect(child.stderr.take().expect("piped"));
        let lines = lines(child.stdout.take().expect("piped"));
        let mut report = String::new();
        while !report.contains("Ctrl-C") {
            let Ok(line) = lines.recv_timeout(PATIENCE) else {
                let _ = child.kill();
                panic!(
                    "{up:?}: no report; {report}{}",
                    stderr.lock().expect("not poisoned")
                );
            };
            writeln!(report, "{line}").expect("strings grow");
        }
        let address = report
            .split("http://")
            .nth(1)
            .and_then(|rest| rest.split('/').next());
        let address = address.expect("the report has an address").parse();
        let pid = |part: &str| part.split(')').next().expect("a number").parse();
        let shards = report.split("(process ").skip(1).map(pid);
        let cluster = Self {
            child,
            address: address.expect("it is an address"),
            shards: shards.collect::<Result<_, _>>().expect("process ids"),
            stderr,
        };
        let is_here = !up.get_args().any(|argument| argument == "--topology");
        let shards = if is_here { &*cluster.shards } else { &[] };
        let names = report.split(" served at ").next().unwrap_or_default();
        let models = names.matches(", ").count() + 1;
        nothing_else_listens((cluster.pid(), cluster.address), shards, models);
        cluster
    }

    /// The coordinator's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of its shards now, oldest first.
    pub(crate) fn children(&self) -> Vec<u32> {
        let pid = self.pid();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        let mut children: Vec<u32> = tasks
            .into_iter()
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok())
            .flat_map(|pids| {
                pids.split_whitespace()
                    .filter_map(|pid| pid.parse().ok())
                    .collect::<Vec<_>>()
            })
            .filter(|pid| is_running(*pid))
            .collect();
        children.sort_unstable();
        children
    }

    /// Sends a signal to the coordinator.
    pub(crate) fn signal(&self, signal: Signal) {
        send_signal(self.pid(), signal);
    }

    /// Waits until the coordinator has ended and all its shards are gone.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let shards = [self.shards.clone(), self.children()].concat();
        let mut status = None;
        until("the coordinator ends", || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        // The invariant is "gone when the exit code is there"; a killed process is then at most
        // waiting for init to collect it.
        for pid in &shards {
            assert!(!is_running(*pid), "shard {pid} was left behind");
        }
        self.shards.clear();
        let stderr = self.stderr.lock().expect("not poisoned").clone();
        (status.expect("it has ended"), stderr)
    }

    /// Kills the coordinator alone.
    pub(crate) fn kill(mut self) {
        self.shards.clear();
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }

    /// Ends it in order.
    pub(crate) fn stop(self) {
        self.signal(Signal::TERM);
        let (status, stderr) = self.wait();
        assert_eq!(status.code(), Some(0), "{stderr}");
    }
}

impl Drop for Cluster {
    #[expect(clippy::print_stdout, reason = "shown with the test that failed")]
    fn drop(&mut self) {
        if thread::panicking() {
            println!("it said: {}", self.stderr.lock().expect("not poisoned"));
        }
        // For tests that fail half-way. A second request to end is obeyed at once, also by shards of other nodes.
        for _ in 0..2 {
            if let Ok(None) = self.child.try_wait() {
                self.signal(Signal::CONT);
                self.signal(Signal::TERM);
                thread::sleep(Duration::from_millis(500));
            }
        }
        // Shards that it could not end would wait for another one, and those that were taken over are nobody's children.
        let shards = [self.children(), std::mem::take(&mut self.shards)].concat();
        let _ = self.child.kill();
        let _ = self.child.wait();
        for shard in shards {
            topology::launch::process::ProcessId::of(shard).inspect(|shard| shard.kill());
        }
    }
}

/// Waits until `done`; fails when that takes too long.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = clock::now();
    while !done() {
        assert!(clock::since(begun) < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal to any process.
pub(crate) fn send_signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("a process id"), signal).expect("it is running");
}

/// Whether a process exists and is not merely waiting to be collected.
pub(crate) fn is_running(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| !status.contains("State:\tZ") && !status.contains("State:\tX"))
}

fn lines(stdout: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn collect(mut stderr: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let kept = text.clone();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut bytes) {
            let part = String::from_utf8_lossy(&bytes[..count]);
            kept.lock().expect("not poisoned").push_str(&part);
        }
    });
    text
}
