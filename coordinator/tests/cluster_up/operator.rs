//! What an operator does with a cluster that runs: `status`, `logs`, `down`, and `up` again.

use crate::client::{Stream, endless, get, request};
use crate::process::{Cluster, RUN_DIR, command, run, send_signal, until};
use crate::turn;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

const COMPLETIONS: &str = "/v1/completions";

/// Exit code and JSON of `cluster status`.
fn status(port: &str) -> (i32, Value) {
    let (code, stdout, stderr) = run(&["status", "--json", "--port", port]);
    let status = serde_json::from_str(&stdout);
    (code, status.unwrap_or_else(|_| panic!("{stdout}{stderr}")))
}

fn state(port: &str) -> String {
    status(port).1["state"].as_str().expect("a text").to_owned()
}

#[test]
fn an_instruction_set_is_forced_or_refused() {
    let _turn = turn();
    let cpu = fs::read_to_string("/proc/cpuinfo").expect("this is Linux");
    for (isa, flag, name) in [
        ("amx", "amx_bf16", "AMX"),
        ("avx512", "avx512f", "AVX-512"),
        ("avx2", "avx2", "AVX2"),
        ("portable", "", "portable"),
    ] {
        let arguments = [
            "--tensor-parallel-size",
            "1",
            "--cpus",
            "1",
            "--cpu-isa",
            isa,
        ];
        if cpu.contains(flag) {
            let cluster = Cluster::start(&arguments);
            let (_, logs, _) = run(&["logs", "0"]);
            let device = format!("cpu (1 thread, {name})");
            assert!(logs.contains(&device), "{device} is not in:\n{logs}");
            cluster.stop();
        } else {
            let (code, _, stderr) = run(&[&["up", "--port", "0"][..], &arguments].concat());
            let sentence = format!("--cpu-isa {isa} cannot be used: this CPU");
            assert!(code == 1 && stderr.contains(&sentence), "{code}: {stderr}");
        }
    }
}

#[test]
fn a_running_cluster_says_where_it_stands() {
    let _turn = turn();
    let cluster = Cluster::start(&["--tensor-parallel-size", "2"]);
    let port = cluster.address.port().to_string();
    let mut stream = Stream::open(cluster.address, COMPLETIONS, endless("Once", 1000));
    stream.next().expect("it streams");
    // It is the only one: nobody has to say which.
    let (code, table, stderr) = run(&["status"]);
    assert_eq!(code, 0, "{table}{stderr}");
    for part in [
        &format!("cluster {port}: ready"),
        &format!("process {}", cluster.pid()),
        "epoch 0, 0 recoveries",
        "1 running, 0 waiting",
        "localhost",
    ] {
        assert!(table.contains(part), "{part} is not in:\n{table}");
    }
    let (code, said) = status(&port);
    assert_eq!((code, &said["state"]), (0, &"ready".into()));
    assert!(
        said["models"][0]["queue"]["kv_tokens_used"].as_u64() > Some(0),
        "{said}"
    );
    for (rank, pid) in cluster.shards.iter().enumerate() {
        let said = &said["ranks"][rank];
        assert_eq!(said["pid"], *pid, "{said}");
        assert!(said["used_bytes"].as_u64() > Some(1 << 20), "{said}");
        assert!(said["last_step_seconds"].as_f64() > Some(0.0), "{said}");
    }

    // A rank that dies is replaced, and its old process is not forgotten.
    send_signal(cluster.shards[1], Signal::KILL);
    until("it goes on", || {
        status(&port).1["models"][0]["recoveries"] == 1
    });
    until("it is ready", || state(&port) == "ready");
    let (_, said) = status(&port);
    assert_eq!(
        (
            &said["models"][0]["epoch"],
            &said["ranks"][0]["replacements"]
        ),
        (&1.into(), &0.into())
    );
    assert_eq!(said["ranks"][1]["replacements"], 1, "{said}");
    let replaced = said["ranks"][1]["pid"].as_u64().expect("it has a process");
    assert!(
        cluster
            .children()
            .iter()
            .any(|pid| u64::from(*pid) == replaced)
    );
    let (_, logs, _) = run(&["logs", "1"]);
    for part in [
        &format!("process {} was started", cluster.shards[1]),
        "its process has ended (signal: 9",
        &format!("process {replaced} was started"),
        "admitted to the cluster",
    ] {
        assert!(logs.contains(part), "{part} is not in:\n{logs}");
    }
    let (_, both, _) = run(&["logs"]);
    assert!(both.contains("[0] ") && both.contains("[1] "), "{both}");
    let (_, last, _) = run(&["logs", "-n", "1", "1"]);
    assert_eq!(last.lines().count(), 1, "{last}");
    let (code, _, stderr) = run(&["logs", "7"]);
    assert!(
        code == 2 && stderr.contains("no shard 7; it has 2"),
        "{stderr}"
    );
    cluster.stop();
    let (_, after, _) = run(&["logs", "--port", &port, "1"]);
    assert!(after.starts_with(&logs), "logs are kept: {after}");
}

#[test]
fn a_frozen_process_is_told_from_one_that_serves() {
    let _turn = turn();
    let cluster = Cluster::start(&["--tensor-parallel-size", "1"]);
    let port = cluster.address.port().to_string();
    cluster.signal(Signal::STOP);
    let (code, said) = status(&port);
    assert_eq!((code, &said["state"]), (1, &"silent".into()));
    let reason = said["reason"].as_str().expect("a text");
    assert!(
        reason.contains(&format!("kill -9 {}", cluster.pid())),
        "{reason}"
    );
    let (code, _, stderr) = run(&["down", "--now"]);
    assert!(code == 1 && stderr.contains("does not answer"), "{stderr}");
    // What was asked for arrived, and counts as soon as it can.
    cluster.signal(Signal::CONT);
    assert_eq!(cluster.wait().0.code(), Some(130));
    let (code, _, stderr) = run(&["status", "--port", &port]);
    assert_eq!(code, 2);
    assert!(stderr.contains("no cluster on port"), "{stderr}");
}

#[test]
fn down_waits_for_requests_says_so_and_up_again_works() {
    let _turn = turn();
    let cluster = Cluster::start(&["--name", "again", "--tensor-parallel-size", "1"]);
    let mut stream = Stream::open(cluster.address, COMPLETIONS, endless("Once", 300));
    stream.next().expect("it streams");
    let followed = command(&["logs", "-f", "--name", "again", "0"])
        .stdout(Stdio::piped())
        .spawn();
    let mut followed = followed.expect("the binary runs");
    let (code, stdout, stderr) = run(&["down"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("cluster again: it ended as asked; no request was cut off"),
        "{stdout}"
    );
    assert!(stderr.contains("for 1 requests"), "{stderr}");
    assert_eq!(stream.read_to_end().1, "[DONE]");
    let (status, _) = cluster.wait();
    assert_eq!(status.code(), Some(0));
    let lines = BufReader::new(followed.stdout.take().expect("piped")).lines();
    let last = lines.map_while(Result::ok).last().expect("it printed");
    assert!(
        last.contains("its process has ended (exit status: 0)"),
        "{last}"
    );
    assert!(followed.wait().expect("it ends with the cluster").success());

    let cluster = Cluster::start(&["--name", "again", "--shutdown-timeout", "0"]);
    let mut stream = Stream::open(cluster.address, COMPLETIONS, endless("Once", 1000));
    stream.next().expect("it streams");
    let (code, stdout, _) = run(&["down", "--name", "again"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("1 request was cut off"), "{stdout}");
    assert_eq!(cluster.wait().0.code(), Some(0));

    let cluster = Cluster::start(&["--name", "again"]);
    let mut stream = Stream::open(cluster.address, COMPLETIONS, endless("Once", 1000));
    stream.next().expect("it streams");
    let (code, stdout, _) = run(&["down", "--now"]);
    assert!(
        code == 0 && stdout.contains("ended at once; 1 request"),
        "{stdout}"
    );
    assert_eq!(cluster.wait().0.code(), Some(130));
}

#[test]
fn clusters_do_not_touch_and_a_crash_leaves_nothing_in_the_way() {
    let _turn = turn();
    let one = ["--name", "one", "--tensor-parallel-size", "1"];
    let first = Cluster::start(&one);
    let second = Cluster::start(&["--name", "two", "--tensor-parallel-size", "1"]);
    let port = second.address.port().to_string();
    for command in ["status", "logs", "down"] {
        let (code, _, stderr) = run(&[command]);
        assert_eq!(code, 2, "{command}");
        for part in [
            "2 clusters run; say which",
            "--name one",
            "--name two",
            &format!("--port {port}"),
        ] {
            assert!(stderr.contains(part), "{command}: {stderr}");
        }
    }
    let holder = format!("cluster one (process {}", first.pid());
    let (code, _, stderr) = run(&[&["up", "--port", "0"], &one[..]].concat());
    assert!(code == 2 && stderr.contains(&holder), "{stderr}");
    let (code, _, stderr) = run(&["up", "--port", &first.address.port().to_string()]);
    assert!(code == 2 && stderr.contains(&holder), "{stderr}");
    let (code, _, _) = run(&["down", "--port", &port]);
    assert_eq!((code, second.wait().0.code()), (0, Some(0)));
    get(first.address, "/health");

    let socket = Path::new(RUN_DIR).join("one/admin.sock");
    let mode = |path: &Path| {
        fs::metadata(path)
            .expect("it is there")
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(mode(&socket), 0o600);
    assert_eq!(mode(socket.parent().expect("a directory")), 0o700);
    for path in ["/status", "/drain", "/now", "/admin/status"] {
        assert_eq!(
            request(first.address, "POST", path, "").0,
            404,
            "{path} over the network"
        );
    }
    first.kill();
    assert!(UnixStream::connect(&socket).is_err(), "it is gone");
    let (code, stdout, _) = run(&["status", "--name", "one"]);
    assert!(code == 1 && stdout.contains("one: orphaned"), "{stdout}");
    let again = Cluster::start(&one);
    assert_eq!(run(&["status", "--name", "one"]).0, 0);
    again.stop();
}
