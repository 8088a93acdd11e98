//! Shards of other nodes and the `ssh` they are reached by: one that is killed, and shards that are frozen. On an `ssh`
//! that runs everything here, and leaves it alone when it is killed.

use crate::adopt::{all_gone, forget, load, loads, status};
use crate::fake_ssh::FakeNodes;
use crate::process::{Cluster, is_running, send_signal, until};
use crate::recovery::{recoveries, round};
use crate::turn;
use rustix::process::Signal;
use std::fs;
use std::thread;
use std::time::Duration;

/// Between two signals that are not to be taken for one; less than what ends by itself is given.
const PAUSE: Duration = Duration::from_millis(300);

/// Processes of both shards now.
fn shards(name: &str) -> [u32; 2] {
    let (_, said) = status(name);
    [0, 1].map(|rank| {
        let pid = said["ranks"][rank]["pid"].as_u64();
        pid.and_then(|pid| pid.try_into().ok()).expect("a process")
    })
}

/// Kills the `ssh` by which the coordinator reaches node `b`.
fn kill_ssh(cluster: &Cluster) {
    let reaches = |pid: &u32| {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline"));
        arguments.is_ok_and(|arguments| arguments.contains("node-b"))
    };
    let ssh = cluster.children().into_iter().find(reaches);
    send_signal(ssh.expect("it is reached"), Signal::KILL);
}

#[test]
fn a_shard_whose_ssh_is_killed_is_replaced_and_one_that_waits_is_taken_over() {
    let _turn = turn();
    let name = "ssh-killed";
    forget(name);
    let nodes = FakeNodes::make();
    let mut cluster = Cluster::launch(nodes.up(name, &[]));
    let golden = round(cluster.address, 4, 40);
    // That of a shard which was started through it, and then of one that was taken over.
    for loaded in [2, 3] {
        let (address, before) = (cluster.address, shards(name));
        let recovered = recoveries(&cluster);
        let told = thread::spawn(move || round(address, 4, 40));
        kill_ssh(&cluster);
        until("it is replaced", || recoveries(&cluster) > recovered);
        assert!(!is_running(before[1]), "nothing was left to wake up");
        assert_eq!(told.join().expect("a stream was lost"), golden);
        let after = shards(name);
        assert!(after[0] == before[0] && after[1] != before[1]);

        // It ends with its coordinator, at the latest.
        let ssh = cluster.children();
        cluster.kill();
        for ssh in ssh.into_iter().filter(|ssh| is_running(*ssh)) {
            send_signal(ssh, Signal::KILL);
        }
        cluster = Cluster::launch(nodes.up(name, &["--adopt"]));
        assert_eq!(shards(name), after);
        assert_eq!(loads(name, 2), [1, loaded]);
    }
    let last = shards(name);
    cluster.stop();
    all_gone(&last);
}

#[test]
fn a_frozen_shard_is_ended_before_another_one_takes_its_place() {
    let _turn = turn();
    let name = "ssh-frozen";
    forget(name);
    let nodes = FakeNodes::make();
    let cluster = Cluster::launch(nodes.up(name, &[]));
    let golden = round(cluster.address, 4, 40);
    let before = cluster.shards.clone();
    // Nobody but the one that takes its place can do it.
    nodes.refuse("--attend");
    send_signal(before[1], Signal::STOP);
    until("it is replaced", || recoveries(&cluster) > 0.0);
    assert!(!is_running(before[1]), "it held memory of its device");
    assert_eq!(round(cluster.address, 4, 40), golden);
    let after = shards(name);
    assert!(after[0] == before[0] && after[1] != before[1]);
    cluster.stop();
    all_gone(&after);
}

#[test]
fn a_frozen_shard_does_not_outlive_a_coordinator_that_ends_at_once() {
    let _turn = turn();
    let name = "ssh-at-once";
    let nodes = FakeNodes::make();
    // While it is given time to end by itself, and while requests are.
    for streams in [0, 2] {
        forget(name);
        let cluster = Cluster::launch(nodes.up(name, &[]));
        let open = load(cluster.address, streams);
        send_signal(cluster.shards[1], Signal::STOP);
        cluster.signal(Signal::TERM);
        thread::sleep(PAUSE);
        cluster.signal(Signal::TERM);
        let (status, stderr) = cluster.wait();
        assert_eq!(status.code(), Some(130), "{stderr}");
        for stream in open {
            stream.join().expect("it is only cut off");
        }
    }
}
