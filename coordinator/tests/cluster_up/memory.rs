//! A shard that runs into a memory limit: the kernel ends it, and nothing is lost. Skipped, with a line that says
//! so, where no such limit can be set.

use crate::process::{Cluster, RUN_DIR, is_running, until};
use crate::recovery::undisturbed_by;
use crate::turn;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Room for a process that takes memory until it is ended, and for no shard.
const LIMIT_BYTES: u64 = 64 << 20;

/// A memory cgroup of either version, removed with its value.
struct Limited {
    dir: PathBuf,
}

impl Limited {
    /// `None`, after saying why, where there can be none.
    #[expect(clippy::print_stdout, reason = "a test that did not run must say so")]
    fn make() -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = fs::read_to_string(root.join("cgroup.subtree_control"));
        let (parent, file) = if controllers.is_ok_and(|all| all.contains("memory")) {
            (root.to_owned(), "memory.max")
        } else {
            (root.join("memory"), "memory.limit_in_bytes")
        };
        let dir = parent.join(format!("cluster-test-{}", std::process::id()));
        let made = fs::create_dir(&dir);
        let made = made.and_then(|()| fs::write(dir.join(file), LIMIT_BYTES.to_string()));
        if let Err(error) = made {
            println!(
                "skipped: no memory limit can be set with {}: {error}",
                dir.display()
            );
            let _ = fs::remove_dir(&dir);
            return None;
        }
        Some(Self { dir })
    }

    /// Puts a process under the limit, as the one that is ended first, and uses the limit up.
    fn exhaust(&self, victim: u32) {
        let procs = self.dir.join("cgroup.procs");
        fs::write(format!("/proc/{victim}/oom_score_adj"), "1000").expect("it is ours");
        fs::write(&procs, victim.to_string()).expect("it is moved");
        // It keeps what it reads until a line ends, and none does; then it is ended too.
        let script = "echo $$ > \"$0\" && exec tail /dev/zero";
        let mut hog = Command::new("sh");
        let hog = hog.args(["-c", script]).arg(&procs);
        let hog = hog.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(!hog.expect("there is a shell").success(), "the limit held");
        until("the kernel has ended it", || !is_running(victim));
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

#[test]
fn a_shard_that_runs_out_of_memory_is_replaced_and_the_log_says_what_it_may_have_been() {
    let _turn = turn();
    let Some(limited) = Limited::make() else {
        return;
    };
    let run_out = |cluster: &Cluster| {
        let victim = cluster.shards[1];
        limited.exhaust(victim);
        let log = format!("{RUN_DIR}/memory/logs/rank-1.log");
        let said = "when memory runs out";
        until("the log says so", || {
            fs::read_to_string(&log).is_ok_and(|log| log.contains(said))
        });
    };
    undisturbed_by(&["-tp", "2", "--name", "memory"], &[&run_out]);
}
