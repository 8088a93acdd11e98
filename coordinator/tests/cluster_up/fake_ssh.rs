//! Two nodes without networks of their own: an `ssh` that runs everything on this machine, and that fails where a test
//! says so. What needs real hosts is tested with `network`.

use crate::process::command;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

/// As the real one, it is not the process that it runs: killing it leaves that alone.
const SSH: &str = r#"#!/bin/sh
while [ "$1" != -- ]; do shift; done
host=$2 command=$3
is_any() {
    for file in "$0.$1."*
    do
        [ -e "$file" ] || continue
        pattern=${file#"$0.$1."}
        case "$host $command" in *$pattern*) return 0 ;; esac
    done
    return 1
}
if is_any refuse
then
    echo "kex_exchange_identification: read: Connection reset by peer" >&2
    exit 255
fi
if is_any delay
then
    touch "$0.delayed"
    exec sleep 60
fi
/bin/sh -c "$command"
exit $?
"#;

/// Nodes `a` and `b`.
pub(crate) struct FakeNodes {
    dir: tempfile::TempDir,
}

impl FakeNodes {
    pub(crate) fn make() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let nodes = Self { dir };
        fs::create_dir(nodes.path("bin")).expect("a directory");
        let ssh = nodes.path("bin/ssh");
        fs::write(&ssh, SSH).expect("a file");
        fs::set_permissions(&ssh, Permissions::from_mode(0o700)).expect("it is ours");
        let node = |(name, address): (&str, &str)| {
            format!(
                "[[node]]\nname = \"{name}\"\naddress = \"{address}\"\ncpus = 1\nshards = 1\n\
                 work_dir = \"{}\"\n[node.ssh]\nhost = \"node-{name}\"\n",
                nodes.work_dir(name).display()
            )
        };
        let text = [("a", "127.0.0.2"), ("b", "127.0.0.3")].map(node).concat();
        let text = format!("[coordinator]\naddress = \"127.0.0.1\"\n{text}");
        fs::write(nodes.path("cluster.toml"), text).expect("a file");
        nodes
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the program is put on a node.
    pub(crate) fn work_dir(&self, node: &str) -> PathBuf {
        self.path(node)
    }

    /// The binary with these arguments, on these nodes.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command(arguments);
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let mut path: OsString = self.path("bin").into();
        path.push(":");
        path.push(inherited);
        command.env("PATH", path);
        command
    }

    /// `cluster up` on them, under a name.
    pub(crate) fn up(&self, name: &str, more: &[&str]) -> Command {
        let mut command = self.command(&["up", "--port", "0", "--name", name, "--topology"]);
        command.arg(self.path("cluster.toml")).args(more);
        command
    }

    /// From now on every `ssh` comes to nothing with this shell pattern in its host and what it is to run.
    pub(crate) fn delay(&self, pattern: &str) {
        fs::write(self.path(&format!("bin/ssh.delay.{pattern}")), "").expect("a file");
    }

    /// Whether one did.
    pub(crate) fn is_delayed(&self) -> bool {
        self.path("bin/ssh.delayed").exists()
    }

    /// From now on every `ssh` fails with this shell pattern in its host and what it is to run.
    pub(crate) fn refuse(&self, pattern: &str) {
        fs::write(self.path(&format!("bin/ssh.refuse.{pattern}")), "").expect("a file");
    }

    /// No longer.
    pub(crate) fn allow(&self, pattern: &str) {
        for trouble in ["refuse", "delay"] {
            // It is one of them.
            let _ = fs::remove_file(self.path(&format!("bin/ssh.{trouble}.{pattern}")));
        }
    }
}
