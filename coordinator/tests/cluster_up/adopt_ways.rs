//! The coordinator of shards dies, and then the way to a node is broken, the next coordinator ends early, or files have
//! changed. On an `ssh` that fails when it is told to.

use crate::adopt::{all_gone, forget, loads, status};
use crate::fake_ssh::FakeNodes;
use crate::process::{Cluster, finish, is_running, run, send_signal, until};
use crate::recovery::{recoveries, round};
use crate::turn;
use crate::wrong_input::model;
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

#[test]
fn a_shard_that_nobody_can_look_after_is_replaced_and_the_other_keeps_its_weights() {
    let _turn = turn();
    let name = "adopt-refused";
    forget(name);
    let nodes = FakeNodes::make();
    let mut cluster = Cluster::launch(nodes.up(name, &[]));
    let golden = round(cluster.address, 4, 40);
    // One node refuses; then both do.
    for (refused, survivors, loaded) in [("node-b*--attend", 1, [1, 2]), ("--attend", 0, [2, 3])] {
        let before = cluster.shards.clone();
        cluster.kill();
        nodes.refuse(refused);
        cluster = Cluster::launch(nodes.up(name, &[]));
        nodes.allow(refused);
        assert_eq!(round(cluster.address, 4, 40), golden);
        assert_eq!(loads(name, 2), loaded);
        assert_eq!(cluster.shards[..survivors], before[..survivors]);
        all_gone(&before[survivors..]);
    }
    let shards = cluster.shards.clone();
    cluster.stop();
    all_gone(&shards);
}

#[test]
fn down_can_be_tried_again_where_a_node_was_not_reached() {
    let _turn = turn();
    let name = "adopt-unreached";
    forget(name);
    let nodes = FakeNodes::make();
    let cluster = Cluster::launch(nodes.up(name, &[]));
    let shards = cluster.shards.clone();
    cluster.kill();
    let down = || finish(nodes.command(&["down", "--name", name]));
    nodes.refuse("node-b");
    for count in [1, 0] {
        let (code, _, stderr) = down();
        assert_eq!(code, 1, "{stderr}");
        let said = format!("{count} shards that waited for another one are ended, others are not");
        assert!(stderr.contains(&said), "{stderr}");
        assert!(stderr.starts_with("ending shards on a, b\n"), "{stderr}");
        assert!(
            stderr.contains("rank 1: node-b: it cannot be reached"),
            "{stderr}"
        );
        assert!(stderr.contains("it ends by itself, within"), "{stderr}");
        assert_eq!(
            shards
                .iter()
                .map(|pid| is_running(*pid))
                .collect::<Vec<_>>(),
            [false, true]
        );
    }
    nodes.allow("node-b");
    // Another cluster of that name does not hide it.
    nodes.refuse("node-b*--attend");
    let other = Cluster::launch(nodes.up(name, &["--max-model-len", "128"]));
    let others = other.shards.clone();
    other.stop();
    all_gone(&others);
    assert!(is_running(shards[1]));
    nodes.allow("node-b*--attend");
    let (code, stdout, stderr) = down();
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("1 shards that waited"), "{stdout}");
    all_gone(&shards);
    let (code, _, stderr) = run(&["down", "--name", name]);
    assert!(code == 2 && stderr.contains("no cluster named"), "{stderr}");
}

#[test]
fn who_ends_before_it_has_taken_shards_over_leaves_them_to_the_next_one() {
    let _turn = turn();
    let name = "adopt-interrupted";
    forget(name);
    let nodes = FakeNodes::make();
    let cluster = Cluster::launch(nodes.up(name, &[]));
    let shards = cluster.shards.clone();
    cluster.kill();
    nodes.delay("--attend");
    let mut up = nodes.up(name, &[]);
    let up = up.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut up = up.expect("the binary runs");
    until("it looks for shards", || nodes.is_delayed());
    send_signal(up.id(), Signal::INT);
    assert_eq!(up.wait().expect("it is our child").code(), Some(0));
    nodes.allow("--attend");
    let (code, said) = status(name);
    assert_eq!((code, &said["state"]), (1, &"orphaned".into()), "{said}");
    let cluster = Cluster::launch(nodes.up(name, &["--adopt"]));
    assert_eq!(cluster.shards, shards);
    assert_eq!(loads(name, 2), [1, 1]);
    cluster.stop();
    all_gone(&shards);
    let (code, _, stderr) = run(&["status", "--name", name]);
    assert!(code == 2 && stderr.contains("no cluster named"), "{stderr}");
}

/// Longer than a link may be silent.
const FREEZE: Duration = Duration::from_secs(3);

#[test]
fn what_a_shard_says_while_its_coordinator_is_frozen_is_not_lost() {
    let _turn = turn();
    let name = "adopt-frozen";
    forget(name);
    let nodes = FakeNodes::make();
    let cluster = Cluster::launch(nodes.up(name, &[]));
    let golden = round(cluster.address, 4, 40);
    let shards = cluster.shards.clone();
    cluster.signal(Signal::STOP);
    thread::sleep(FREEZE);
    cluster.signal(Signal::CONT);
    until("its shards are replaced", || recoveries(&cluster) > 0.0);
    assert_eq!(round(cluster.address, 4, 40), golden);
    all_gone(&shards);
    for rank in ["0", "1"] {
        let (_, logs, _) = run(&["logs", "--name", name, rank]);
        assert!(logs.contains("held for another coordinator"), "{logs}");
    }
    cluster.stop();
    for node in ["a", "b"] {
        let files = fs::read_dir(nodes.work_dir(node)).expect("it is there");
        assert_eq!(files.count(), 1, "only the program is left");
    }
}

#[test]
fn shards_that_wait_do_not_wait_for_nodes_to_check_their_files() {
    let _turn = turn();
    let name = "adopt-checked";
    forget(name);
    let nodes = FakeNodes::make();
    let directory = model();
    vouch(directory.path());
    let path = directory.path().to_str().expect("a plain name");
    let cluster = Cluster::launch(nodes.up(name, &["--model", path]));
    let shards = cluster.shards.clone();
    cluster.kill();
    nodes.refuse("--examine");
    let cluster = Cluster::launch(nodes.up(name, &["--model", path]));
    assert_eq!(cluster.shards, shards);
    // Those that are started do: for one that died meanwhile, and for all.
    cluster.kill();
    send_signal(shards[1], Signal::KILL);
    for _ in 0..2 {
        let (code, _, stderr) = finish(nodes.up(name, &["--model", path]));
        assert!(
            code == 2 && stderr.contains("Connection reset"),
            "{code} {stderr}"
        );
        all_gone(&shards);
    }
}

/// Writes down what a model's files are.
fn vouch(directory: &Path) {
    let mut sums = Command::new("sh");
    let sums = sums.args(["-c", "sha256sum *.* > SHA256SUMS"]);
    let done = sums.current_dir(directory).status();
    assert!(done.expect("sha256sum runs").success());
}

/// Changes one byte at a file's end, and nothing that is seen without reading all of it.
fn falsify(file: &Path) {
    let about = fs::metadata(file).expect("it is there");
    let mut bytes = fs::read(file).expect("it is there");
    *bytes.last_mut().expect("it is not empty") ^= 1;
    fs::write(file, bytes).expect("it is ours");
    let time = about.modified().expect("it has one");
    let file = fs::File::options().write(true).open(file);
    file.and_then(|file| file.set_modified(time))
        .expect("it is ours");
}

#[test]
fn weights_are_read_again_only_for_shards_that_are_started_and_the_rest_for_all() {
    let _turn = turn();
    let name = "adopt-sums";
    forget(name);
    let directory = model();
    let template = directory.path().join("chat_template.jinja");
    fs::write(&template, "{{ messages[0].content }}").expect("a file");
    vouch(directory.path());
    let path = directory.path().to_str().expect("a plain name");
    let up = ["--name", name, "-tp", "2", "--model", path];
    let again = || run(&[&["up", "--port", "0"], &up[..]].concat());
    let cluster = Cluster::start(&up);
    let golden = round(cluster.address, 4, 40);
    let shards = cluster.shards.clone();
    cluster.kill();
    falsify(&template);
    let (code, _, stderr) = again();
    let said = "chat_template.jinja is not the file that SHA256SUMS lists";
    assert!(code == 2 && stderr.contains(said), "{code} {stderr}");
    falsify(&template);

    falsify(&directory.path().join("model.safetensors"));
    let cluster = Cluster::start(&up);
    assert_eq!(cluster.shards, shards, "what they have is what it was");
    assert_eq!(round(cluster.address, 4, 40), golden);
    cluster.kill();
    send_signal(shards[1], Signal::KILL);
    let (code, _, stderr) = again();
    let said = "model.safetensors is not the file that SHA256SUMS lists";
    assert!(code == 2 && stderr.contains(said), "{code} {stderr}");
    all_gone(&shards);
}
