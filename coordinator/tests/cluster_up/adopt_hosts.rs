//! The coordinator of two hosts dies: what is promised of shards beside it holds of those over there. Skipped, with a
//! line that says so, where hosts cannot be made.

use crate::adopt::{all_gone, forget, load, loads, status};
use crate::hosts::nodes;
use crate::network::Network;
use crate::process::{Cluster, is_running, run, send_signal, until};
use crate::recovery::{recoveries, round};
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

const STREAMS: usize = 8;
const TOKENS: u32 = 60;

/// Two hosts, and a name that nothing was left under.
fn hosts(name: &str) -> Option<(Network, PathBuf)> {
    let network = Network::make()?;
    forget(name);
    let file = network.topology(&nodes(1));
    Some((network, file))
}

/// The shards of both hosts.
fn shards(network: &Network) -> Vec<u32> {
    ["a", "b"].map(|node| network.shards(node)).concat()
}

/// No process of ours, nor any file but the program.
fn nothing_is_left(network: &Network) {
    for node in ["a", "b"] {
        until("no process is left on the node", || {
            network.processes(node).is_empty()
        });
        let files = fs::read_dir(network.work_dir(node)).expect("it is there");
        let names = files.map(|file| file.expect("a file").file_name());
        let names: Vec<_> = names.collect();
        let [program] = names.as_slice() else {
            panic!("{node}: {names:?}");
        };
        assert!(program.to_string_lossy().starts_with("cluster-"));
    }
}

#[test]
fn shards_of_other_hosts_are_taken_over_and_nothing_is_loaded() {
    let _turn = turn();
    let name = "adopt-hosts";
    let Some((network, file)) = hosts(name) else {
        return;
    };
    let up = ["--name", name, "--topology", file.to_str().expect("UTF-8")];
    let mut cluster = Cluster::start(&up);
    let golden = round(cluster.address, STREAMS, TOKENS);
    let before = shards(&network);
    assert_eq!(before.len(), 2);
    // Those that were started through `ssh`, and then those that were taken over.
    for adopt in [&[][..], &["--adopt"]] {
        let open = load(cluster.address, STREAMS);
        cluster.kill();
        for stream in open {
            let last = stream.join().expect("it is only cut off");
            assert_ne!(last, "[DONE]", "the longest was still under way");
        }
        let (code, said) = status(name);
        assert_eq!((code, &said["state"]), (1, &"orphaned".into()), "{said}");
        let reason = said["reason"].as_str().expect("a text");
        assert!(reason.contains("2 of 2 shards hold"), "{reason}");
        let shard = &said["ranks"][1];
        assert_eq!(
            (&shard["host"], &shard["pid"]),
            (&"b".into(), &before[1].into())
        );

        cluster = Cluster::start(&[&up, adopt].concat());
        assert_eq!(shards(&network), before, "shards keep their processes");
        assert_eq!(round(cluster.address, STREAMS, TOKENS), golden);
    }
    assert_eq!(loads(name, 2), [1, 1], "nothing was loaded again");
    until("all that they said over there is here, once", || {
        let (_, logs, _) = run(&["logs", "--name", name, "1"]);
        let count = |text| logs.matches(text).count();
        (count("held for another"), count("coordinator takes over")) == (2, 2)
    });

    // A shard that is killed is one like any other, and so is one that died while it waited.
    let recovered = recoveries(&cluster);
    send_signal(before[1], Signal::KILL);
    until("it is replaced", || recoveries(&cluster) > recovered);
    assert_eq!(round(cluster.address, STREAMS, TOKENS), golden);
    let between = shards(&network);
    assert_eq!(between[0], before[0]);
    cluster.kill();
    send_signal(between[1], Signal::KILL);
    let cluster = Cluster::start(&up);
    let after = shards(&network);
    assert_eq!((after.len(), after[0]), (2, before[0]));
    assert!(after[1] != before[1] && after[1] != between[1]);
    assert_eq!(loads(name, 2), [1, 3]);
    assert_eq!(round(cluster.address, STREAMS, TOKENS), golden);
    cluster.stop();
    all_gone(&after);
    nothing_is_left(&network);
}

#[test]
fn shards_of_other_hosts_wait_as_long_as_they_may_and_leave_nothing() {
    let _turn = turn();
    let name = "adopt-hosts-grace";
    let Some((network, file)) = hosts(name) else {
        return;
    };
    let file = file.to_str().expect("UTF-8");
    let cluster = Cluster::start(&[
        "--name",
        name,
        "--topology",
        file,
        "--shard-grace-period",
        "2",
    ]);
    let waiting = shards(&network);
    cluster.kill();
    let begun = clock::now();
    all_gone(&waiting);
    let took = clock::since(begun);
    assert!(took > Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    nothing_is_left(&network);
    let up = [
        "up",
        "--adopt",
        "--name",
        name,
        "--port",
        "0",
        "--topology",
        file,
    ];
    let (code, _, stderr) = run(&[&up[..], &["--shard-grace-period", "2"]].concat());
    assert!(
        code != 0 && stderr.contains("nothing to adopt"),
        "{code} {stderr}"
    );
    nothing_is_left(&network);
}

#[test]
fn down_ends_shards_that_wait_on_other_hosts_and_other_settings_replace_them() {
    let _turn = turn();
    let name = "adopt-hosts-down";
    let Some((network, file)) = hosts(name) else {
        return;
    };
    let up = ["--name", name, "--topology", file.to_str().expect("UTF-8")];
    let cluster = Cluster::start(&up);
    let first = shards(&network);
    cluster.kill();
    let other = ["--adopt", "--port", "0", "--max-model-len", "512"];
    let (code, _, stderr) = run(&[&["up"], &up[..], &other].concat());
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("max-model-len was 1024, and is 512"),
        "{stderr}"
    );
    assert_eq!(shards(&network), first, "they are left alone");

    let cluster = Cluster::start(&[&up[..], &["--block-size", "32"]].concat());
    let second = shards(&network);
    assert!(
        !first.iter().any(|pid| is_running(*pid)),
        "they are ended first"
    );
    assert_eq!(second.len(), 2);
    cluster.kill();
    // One that is frozen does not outlive it either.
    send_signal(second[1], Signal::STOP);
    let (code, stdout, stderr) = run(&["down", "--name", name]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("2 shards that waited"), "{stdout}");
    assert!(!second.iter().any(|pid| is_running(*pid)));
    nothing_is_left(&network);
    assert_eq!(run(&["down", "--name", name]).0, 2);
}
